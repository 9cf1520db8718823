"""From a config to engines: deals devices out, lays out pools, loads weights; compiles nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels.paged_attention.api import PLATFORMS
from pdjax.config import Config
from pdjax.device.compat import use_virtual_cpu_devices
from pdjax.device.engine import JaxDecodeEngine, JaxPrefillEngine
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.transfer import DeviceTransfer
from pdjax.device.mesh import DECODE_RULES, PREFILL_RULES, Rules, make_mesh, take_devices
from pdjax.device.model.checkpoints.api import Checkpoint
from pdjax.device.model.transformer import Params
from pdjax.device.model.weights import load_params, random_params
from pdjax.kv_layout import KVLayout
from pdjax.model_spec import ModelSpec


@dataclass(frozen=True)
class Engines:
    """The device column of a run, ready to be driven through the door."""

    prefill: list[JaxPrefillEngine]
    decode: list[JaxDecodeEngine]
    transfer: DeviceTransfer


def build_engines(
    config: Config, spec: ModelSpec, context: int, checkpoint: Checkpoint | None
) -> Engines:
    """Meshes, weights, pools and steps of `config`.

    Args:
      config: the run.
      spec: the model's shapes.
      context: longest sequence served, tokens.
      checkpoint: where the weights are; None makes random ones.

    Raises:
      ValueError: a layout that cannot work, with the reason; nothing has been loaded then.
    """
    use_virtual_cpu_devices(config.cpu_devices or config.devices)
    _check_attention(config.decode.attention, jax.default_backend())
    p, d = config.prefill, config.decode
    prefill_layout = _layout(config, spec, stages=1, tp=p.tp)
    decode_layout = _layout(config, spec, stages=d.stages, tp=d.tp)
    for layout in (prefill_layout, decode_layout):
        _check_mlp(spec, layout.tp)
    prefill_pages = p.pages or 1 + p.max_sequences * prefill_layout.pages_for(context)
    decode_pages = d.pages or 1 + d.rows * decode_layout.pages_for(context)

    def own(layout: KVLayout, devices: Sequence[jax.Device], rules: Rules, pages: int) -> PoolOwner:
        mesh = make_mesh(devices, layout.stages, layout.tp)
        return PoolOwner(layout, pages, mesh, rules)

    def weights(pool: PoolOwner, rules: Rules) -> Params:
        return _weights(config, spec, checkpoint, pool.mesh, rules, pool.layout)

    def prefill_engine(pool: PoolOwner, params: Params) -> JaxPrefillEngine:
        return JaxPrefillEngine(params, spec, pool, max_logprobs=config.max_logprobs)

    def decode_engine(pool: PoolOwner, params: Params) -> JaxDecodeEngine:
        return JaxDecodeEngine(
            params,
            spec,
            pool,
            rows=d.rows,
            context=context,
            max_logprobs=config.max_logprobs,
            attention=d.attention,
        )

    if config.colocated:
        [devices] = take_devices([p.tp], ["the colocated engine"])
        pool = own(prefill_layout, devices, PREFILL_RULES, decode_pages + prefill_pages - 1)
        params = weights(pool, PREFILL_RULES)
        prefill, decode = [prefill_engine(pool, params)], [decode_engine(pool, params)]
        return Engines(prefill, decode, DeviceTransfer([pool], [pool]))

    dealt = take_devices(
        [p.tp] * p.engines + [d.stages * d.tp] * d.engines,
        [f"prefill engine {i}" for i in range(p.engines)]
        + [f"decode engine {i}" for i in range(d.engines)],
    )
    sources = [own(prefill_layout, dev, PREFILL_RULES, prefill_pages) for dev in dealt[: p.engines]]
    targets = [own(decode_layout, dev, DECODE_RULES, decode_pages) for dev in dealt[p.engines :]]
    return Engines(
        [prefill_engine(pool, weights(pool, PREFILL_RULES)) for pool in sources],
        [decode_engine(pool, weights(pool, DECODE_RULES)) for pool in targets],
        DeviceTransfer(sources, targets),
    )


def _layout(config: Config, spec: ModelSpec, *, stages: int, tp: int) -> KVLayout:
    dtype = config.kv.dtype or config.model.dtype
    return KVLayout(
        num_layers=spec.num_layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        page_size=config.kv.page_size,
        dtype=dtype,
        itemsize=jnp.dtype(dtype).itemsize,
        stages=stages,
        tp=tp,
    )


def _check_attention(name: str | None, platform: str) -> None:
    here = [each for each, platforms in PLATFORMS.items() if platform in platforms]
    if name is not None and name not in here:
        raise ValueError(
            f"decode.attention={name!r}: on this platform, {platform}, allowed are None and "
            f"{', '.join(here)}"
        )


def _check_mlp(spec: ModelSpec, tp: int) -> None:
    if spec.mlp_dim % tp:
        raise ValueError(f"tp={tp}: does not divide the model's mlp_dim={spec.mlp_dim}")


def _weights(
    config: Config,
    spec: ModelSpec,
    checkpoint: Checkpoint | None,
    mesh: Mesh,
    rules: Rules,
    layout: KVLayout,
) -> Params:
    if checkpoint is None:
        return random_params(
            spec, mesh, rules, layout.stage_layers, config.model.dtype, config.seed
        )
    return load_params(checkpoint, mesh, rules, layout.stage_layers, config.model.dtype)
