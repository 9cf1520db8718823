"""How many layer groups a prefill step is cut into, where the config leaves it open: measured at
the start, in a fraction of a second."""

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from pdjax.config import Config
from pdjax.core.clock import WallClock
from pdjax.core.model_spec import ModelSpec
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.transfer import DeviceTransfer
from pdjax.device.layer_group_plan import Link, plan_groups, small_divisor
from pdjax.device.models.registry import matrix_params
from pdjax.interfaces.transfer import End, Side

PROBES = (1 << 20, 64 << 20)
"""Bytes of the puts that a link is measured with."""

GROUP_OVERHEAD_S = 2e-5
"""What one more group adds to a step: another program, whose dispatch the one before it hides, and
a gather beside it. 6 to 13 us were measured in a step of 13 ms (H200, Llama 3 8B, 512 tokens)."""


def choose_groups(
    config: Config, spec: ModelSpec, transfer: DeviceTransfer, source: PoolOwner
) -> int:
    """`handoff.layer_groups` of a config, or what suits the mesh of the first prefill engine, whose
    pool is `source`."""
    if config.colocated or not config.handoff.streaming:
        return 1
    if config.handoff.layer_groups is not None:
        return config.handoff.layer_groups
    if source.mesh.devices.flat[0].platform == "cpu":
        return small_divisor(spec.num_layers)
    return measure_groups(spec, transfer, source, config.prefill.token_budget, config.model.dtype)


def measure_groups(
    spec: ModelSpec, transfer: DeviceTransfer, source: PoolOwner, tokens: int, dtype: str
) -> int:
    """What the planner makes of a step of `tokens`, of the link to the first decode engine and of
    the speed of `source`'s devices."""
    ends = End(Side.PREFILL, 0), End(Side.DECODE, 0)
    few, many = ((nbytes, transfer.probe(*ends, nbytes)) for nbytes in PROBES)
    path, tp = transfer.path(*ends), source.layout.tp
    links = min(tp, path.target.layout.tp)  # each shard has its own
    rate = matmul_rate(source.mesh.devices.flat[0], spec, tokens, dtype)
    return plan_groups(
        spec.num_layers,
        path.token_bytes() * tokens // links,
        Link.through(few, many),
        step_flops(spec, tokens) / (tp * rate),
        GROUP_OVERHEAD_S,
    )


def step_flops(spec: ModelSpec, tokens: int) -> float:
    """Of the products of all layers; attention is left out, being little where budgets are
    short."""
    return 2.0 * matrix_params(spec) * tokens


def matmul_rate(device: jax.Device, spec: ModelSpec, tokens: int, dtype: str) -> float:
    """FLOP/s of a device in the largest product of a layer, the one into the MLP."""
    where = SingleDeviceSharding(device)
    shapes = (tokens, spec.model_dim), (spec.model_dim, 2 * spec.mlp_dim)
    make = jax.jit(lambda: [jnp.ones(shape, dtype) for shape in shapes], out_shardings=where)
    product = jax.jit(jnp.dot, out_shardings=where)
    x, w = make()
    clock, took = WallClock(), []
    for _ in range(4):  # the first compiles
        started = clock.now()
        jax.block_until_ready(product(x, w))
        took.append(clock.now() - started)
    return 2.0 * tokens * spec.model_dim * 2 * spec.mlp_dim / min(took[1:])
