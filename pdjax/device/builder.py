"""From a config to engines: deals devices out, lays out pools, loads weights; compiles no steps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import jax
from jax.sharding import Mesh

from pallas_kernels.paged_attention.api import PLATFORMS
from pdjax.config import Config
from pdjax.config.checks import MOST_TOKENS
from pdjax.core.kv_layout import KVLayout, split_groups
from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.api import Checkpoint
from pdjax.device.compat import keep_compilations, use_virtual_cpu_devices
from pdjax.device.engine import JaxDecodeEngine, JaxPrefillEngine
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.sizing import Claim, deal_pages
from pdjax.device.kv.transfer import DeviceTransfer
from pdjax.device.layer_groups import choose_groups
from pdjax.device.mesh import DECODE_RULES, PREFILL_RULES, Rules, make_mesh, take_devices
from pdjax.device.models.decoder import Params
from pdjax.device.models.registry import kv_layout
from pdjax.device.models.weights import load_params, random_params
from pdjax.device.worker import OrderedPrefillEngine, OrderedTransfer, on_threads
from pdjax.interfaces.transfer import End, Side


@dataclass(frozen=True)
class Engines:
    """The device column of a run, ready to be driven through the door.

    `on_host_cores`: whether the devices are the cores that the host itself needs.
    """

    prefill: list[JaxPrefillEngine] | list[OrderedPrefillEngine]
    transfer: DeviceTransfer | OrderedTransfer
    decode: list[JaxDecodeEngine]
    on_host_cores: bool

    def close(self) -> None:
        """Wait until everything that engines were asked has been dispatched, then let go of their
        devices' memory. No engine is asked anything from then on; a second call does nothing."""
        for each in (*self.prefill, *self.decode):
            each.close()
        self.transfer.close()


Dealt = list[list[jax.Device]]
"""The devices of each engine of a side."""


def deal_devices(config: Config) -> tuple[Dealt, Dealt]:
    """Those of the prefill engines and of the decode engines; of a colocated one, twice the same.
    Starts JAX, and needs no model.

    Raises:
      ValueError: there are too few, or decode attention that does not run on them.
    """
    if config.compilation_cache is not None:
        keep_compilations(config.compilation_cache)
    use_virtual_cpu_devices(config.cpu_devices or config.devices)
    _check_attention(config.decode.attention, jax.default_backend())
    p, d = config.prefill, config.decode
    if config.colocated:
        dealt = take_devices([p.tp], ["the colocated engine"])
        return dealt, dealt
    sizes = [p.tp] * p.engines, [d.stages * d.tp] * d.engines
    names = (
        [f"prefill engine {i}" for i in range(p.engines)],
        [f"decode engine {i}" for i in range(d.engines)],
    )
    if config.shared_devices:
        return take_devices(sizes[0], names[0]), take_devices(sizes[1], names[1])
    dealt = take_devices([*sizes[0], *sizes[1]], [*names[0], *names[1]])
    return dealt[: p.engines], dealt[p.engines :]


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
      ValueError: a layout that cannot work, or pools for which there is no memory even without
        weights; nothing has been loaded then. Or, after that, too little memory for a pool.
    """
    for_prefill, for_decode = deal_devices(config)
    builder = _Builder(config, spec, context, checkpoint)
    if config.colocated:
        prefilling = decoding = builder.own([builder.shared(devices) for devices in for_prefill])
    else:
        sources = [builder.source(devices) for devices in for_prefill]
        targets = [builder.target(devices) for devices in for_decode]
        owned = builder.own(sources, targets)
        prefilling, decoding = owned[: len(sources)], owned[len(sources) :]
    transfer = DeviceTransfer(_ends(prefilling, decoding), config.handoff.wire_dtype)
    groups = choose_groups(config, spec, transfer, prefilling[0][0])
    prefill = [builder.prefill_engine(*each, groups) for each in prefilling]
    decode = [builder.decode_engine(*each) for each in decoding]
    on_host_cores = jax.default_backend() == "cpu"
    if _has_dispatch_threads(config):
        ordered, ordered_transfer = on_threads(prefill, transfer)
        return Engines(ordered, ordered_transfer, decode, on_host_cores)
    return Engines(prefill, transfer, decode, on_host_cores)


def _has_dispatch_threads(config: Config) -> bool:
    """Whether prefill engines are dispatched by threads of their own."""
    asked = config.prefill.dispatch_thread
    if asked is not None:
        return asked
    shared = config.colocated or config.shared_devices
    return not shared and jax.default_backend() != "cpu"


Owned = tuple[PoolOwner, Params]
"""Pool and weights of an engine."""


def _ends(prefilling: Sequence[Owned], decoding: Sequence[Owned]) -> dict[End, PoolOwner]:
    """The pool at each end of a hand-off."""
    sides = (Side.PREFILL, prefilling), (Side.DECODE, decoding)
    return {End(side, i): pool for side, owned in sides for i, (pool, _) in enumerate(owned)}


class _Builder:
    """Makes the parts of a run. Weights come before pools, which take what memory they leave."""

    def __init__(
        self, config: Config, spec: ModelSpec, context: int, checkpoint: Checkpoint | None
    ) -> None:
        self._config, self._spec, self._context = config, spec, context
        self._checkpoint = checkpoint
        p, d = config.prefill, config.decode
        dtype = config.kv.dtype or config.model.dtype
        with _fields_of("prefill"):
            self._prefill_layout = kv_layout(spec, config.kv.page_size, dtype, tp=p.tp)
            _check_mlp(spec, p.tp)
        with _fields_of("decode"):
            self._decode_layout = kv_layout(
                spec, config.decode_page_size, d.kv_dtype or dtype, d.stages, d.tp
            )
            _check_mlp(spec, d.tp)
        with _fields_of("handoff"):
            split_groups(spec.num_layers, config.handoff.layer_groups or 1)
        self._prefill_pages = p.pages or self._whole_contexts(self._prefill_layout, p.max_sequences)
        self._decode_pages = d.pages or self._whole_contexts(self._decode_layout, d.rows)

    def source(self, devices: Sequence[jax.Device]) -> Claim:
        """The pool of a prefill engine."""
        fixed = self._config.prefill.pages is not None
        return self._claim(
            "prefill.pages", fixed, self._prefill_pages, self._prefill_layout, devices
        )

    def target(self, devices: Sequence[jax.Device]) -> Claim:
        """The pool of a decode engine."""
        fixed = self._config.decode.pages is not None
        return self._claim("decode.pages", fixed, self._decode_pages, self._decode_layout, devices)

    def shared(self, devices: Sequence[jax.Device]) -> Claim:
        """The pool of both ends at once, with the pages of both and one null page."""
        sides = {"prefill.pages": self._config.prefill.pages}
        sides["decode.pages"] = self._config.decode.pages
        left_open = [name for name, pages in sides.items() if not pages]
        field = " and ".join(left_open or sides)
        pages = self._prefill_pages + self._decode_pages - 1
        claim = self._claim(field, not left_open, pages, self._prefill_layout, devices)
        if len(left_open) != 1:
            return claim
        part = next((name, said) for name, said in sides.items() if said)
        return replace(claim, part=part)

    def own(self, sources: Sequence[Claim], targets: Sequence[Claim] = ()) -> list[Owned]:
        """Load the weights of all engines, then lay out their pools in what memory is left: those
        of several engines may share a device, or the memory of the host."""
        claims, fraction = [*sources, *targets], self._config.kv.memory_fraction
        deal_pages(claims, fraction)  # what fits not even without weights is refused at once
        rules = [PREFILL_RULES] * len(sources) + [DECODE_RULES] * len(targets)
        meshes = [make_mesh(each.devices, each.layout.stages, each.layout.tp) for each in claims]
        weights = [
            self._weights(mesh, its_rules, claim.layout)
            for mesh, its_rules, claim in zip(meshes, rules, claims, strict=True)
        ]
        # Whatever else loading took must be free again, or it would be missing for good.
        jax.block_until_ready(weights)
        pages = deal_pages(claims, fraction)
        return [
            (PoolOwner(claims[i].layout, pages[i], meshes[i], rules[i]), weights[i])
            for i in range(len(claims))
        ]

    def _claim(
        self,
        field: str,
        fixed: bool,
        pages: int,
        layout: KVLayout,
        devices: Sequence[jax.Device],
    ) -> Claim:
        return Claim(field, fixed, pages, layout, self._context, devices)

    def prefill_engine(self, pool: PoolOwner, params: Params, groups: int) -> JaxPrefillEngine:
        """A prefill engine of a pool, whose steps are cut into `groups` layer groups."""
        return JaxPrefillEngine(
            params,
            self._spec,
            pool,
            max_logprobs=self._config.max_logprobs,
            layer_groups=groups,
        )

    def decode_engine(self, pool: PoolOwner, params: Params) -> JaxDecodeEngine:
        """A decode engine of a pool."""
        return JaxDecodeEngine(
            params,
            self._spec,
            pool,
            rows=self._config.decode.rows,
            context=self._context,
            max_logprobs=self._config.max_logprobs,
            attention=self._config.decode.attention,
        )

    def _whole_contexts(self, layout: KVLayout, sequences: int) -> int:
        """Pages for so many sequences of the longest kind, and the null page; at most as many as
        have slots that 32 bits can count."""
        wanted = 1 + sequences * layout.pages_for(self._context)
        return min(wanted, (2 * MOST_TOKENS - 1) // layout.page_size)

    def _weights(self, mesh: Mesh, rules: Rules, layout: KVLayout) -> Params:
        spec, layers, dtype = self._spec, layout.stage_layers, self._config.model.dtype
        if self._checkpoint is None:
            return random_params(spec, mesh, rules, layers, dtype, self._config.seed)
        return load_params(self._checkpoint, mesh, rules, layers, dtype)


def _check_attention(name: str | None, platform: str) -> None:
    here = [each for each, platforms in PLATFORMS.items() if platform in platforms]
    if name is not None and name not in here:
        raise ValueError(
            f"decode.attention={name!r}: on this platform, {platform}, allowed are None and "
            f"{', '.join(here)}"
        )


@contextmanager
def _fields_of(owner: str) -> Iterator[None]:
    """What is wrong with a layout names a field of its own; here it is one of the config."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{owner}.{error}") from error


def _check_mlp(spec: ModelSpec, tp: int) -> None:
    if spec.mlp_dim % tp:
        raise ValueError(f"tp={tp}: does not divide the model's mlp_dim={spec.mlp_dim}")
