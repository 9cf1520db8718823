"""How many layer groups a prefill step is cut into, where the config leaves it open: measured at
the start, in a fraction of a second."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from pdjax.config import Config
from pdjax.core.clock import WallClock
from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.core.model_spec import ModelSpec
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.wire import Wire
from pdjax.device.layer_group_plan import Link, plan_groups, small_divisor
from pdjax.device.models.registry import matrix_params
from pdjax.device.sharing import shared
from pdjax.interfaces.transport import Transport

PROBES = (1 << 20, 64 << 20)
"""Bytes of the puts that a link is measured with."""

GROUP_OVERHEAD_S = 2e-5
"""What one more group adds to a step: another program, whose dispatch the one before it hides, and
a gather beside it. 6 to 13 us were measured in a step of 13 ms (H200, Llama 3 8B, 512 tokens)."""


def choose_groups(
    config: Config,
    spec: ModelSpec,
    transport: Transport,
    pools: Mapping[PoolId, PoolOwner],
    sources: Sequence[PoolId],
    targets: Sequence[PoolId],
) -> dict[PoolId, int]:
    """How many layer groups the steps over each of the pools `sources` are cut into:
    `handoff.layer_groups` of a config, or what suits the pool's mesh and the link to the first of
    `targets` that is another pool. Pools of one layout have one measurement, so that they have as
    many groups."""
    chosen: dict[KVLayout, int] = {}
    for name in sources:
        source = pools[name]
        if source.layout in chosen:
            continue
        if config.colocated or not config.handoff.streaming:
            groups = 1
        elif config.handoff.layer_groups is not None:
            groups = config.handoff.layer_groups
        elif source.mesh.devices.flat[0].platform == "cpu":
            groups = small_divisor(spec.num_layers)
        else:
            target = next(pool for pool in targets if pool != name)
            groups = measure_groups(config, spec, transport, pools, name, target)
        chosen[source.layout] = groups
    return {name: chosen[pools[name].layout] for name in sources}


def measure_groups(
    config: Config,
    spec: ModelSpec,
    transport: Transport,
    pools: Mapping[PoolId, PoolOwner],
    source: PoolId,
    target: PoolId,
) -> int:
    """What the planner makes of a step of `prefill.token_budget` tokens, of the link between two
    pools, and of the speed of the source's devices."""
    few, many = ((nbytes, transport.measure(source, target, nbytes).result()) for nbytes in PROBES)
    tokens, mesh = config.prefill.token_budget, pools[source].mesh
    here, there = pools[source].layout, pools[target].layout
    wire = Wire.between(here, there, config.handoff.wire_dtype)
    links = min(here.tp, there.tp)  # each shard has its own
    rate = matmul_rate(mesh.devices.flat[0], spec, tokens, config.model.dtype)
    return plan_groups(
        spec.num_layers,
        wire.token_bytes(here) * tokens // links,
        Link.through(few, many),
        step_flops(spec, tokens) / (here.tp * rate),
        GROUP_OVERHEAD_S,
    )


def step_flops(spec: ModelSpec, tokens: int) -> float:
    """Of the products of all layers; attention is left out, being little where budgets are
    short."""
    return 2.0 * matrix_params(spec) * tokens


def matmul_rate(device: jax.Device, spec: ModelSpec, tokens: int, dtype: str) -> float:
    """FLOP/s of a device in the largest product of a layer, the one into the MLP."""
    shapes = (tokens, spec.model_dim), (spec.model_dim, 2 * spec.mlp_dim)
    make, product = _product(device, shapes, dtype)
    x, w = make()
    clock, took = WallClock(), []
    for _ in range(4):  # the first compiles
        started = clock.now()
        jax.block_until_ready(product(x, w))
        took.append(clock.now() - started)
    return 2.0 * tokens * spec.model_dim * 2 * spec.mlp_dim / min(took[1:])


@shared
def _product(
    device: jax.Device, shapes: tuple[tuple[int, int], ...], dtype: str
) -> tuple[Callable[[], list[jax.Array]], Callable[[jax.Array, jax.Array], jax.Array]]:
    """Programs that make matrices of ones on a device, and multiply two."""
    where = SingleDeviceSharding(device)
    make = jax.jit(lambda: [jnp.ones(shape, dtype) for shape in shapes], out_shardings=where)
    return make, jax.jit(jnp.dot, out_shardings=where)
