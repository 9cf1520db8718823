"""prefill_attention on Hopper GPUs: the kernel interpreted against plain numpy, and lowered.

Pallas' interpreter runs a kernel's warpgroups as threads that wait for one another within jitted
pieces, each in a thread of XLA. XLA has as many threads as cores, or as devices if these are more.
Three warpgroups on two cores would deadlock without conftest's sixteen devices.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

from pallas_kernels.errors import LIMITS, relative_error
from pallas_kernels.prefill_attention import mosaic_gpu
from pallas_kernels.prefill_attention.api import prefill_attention
from pallas_kernels.prefill_attention.cases import CASES, LARGE_CASES, Case, make_inputs

# Products with unwritten memory warn.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU is interpreted from JAX 0.11 on"
)
SMALL = Case("small", ((5, 20), (1, 1)), padding=2, dtype="bfloat16")
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")


def name_of(case: Case) -> str:
    return case.name.replace(" ", "_")


def taken() -> list[Case]:
    """List the cases that the kernel does not refuse."""
    refusal: Callable[..., str | None] = mosaic_gpu.refusal
    inputs = [make_inputs(case, seed=0) for case in CASES]
    return [x.case for x in inputs if refusal(x.q, x.k_pages, x.kv_pages) is None]


def interpreted(**options: Any) -> Callable[..., jax.Array]:
    """Run three programs, so that each does several pieces of work and reuses its rings."""
    interpreter = plgpu.InterpretGPUParams(**options)
    return partial(mosaic_gpu.prefill_attention, programs=3, interpret=interpreter)


BOTH = replace(
    next(case for case in CASES if case.name == "bf16 window"),
    name="window and soft cap",
    logit_soft_cap=3.0,
)
MANY = next(case for case in CASES if case.name == "bf16 many short")
INTERPRETED = (
    replace(SMALL, name="head dim 128", chunks=((40, 200), (20, 20)), head_dim=128, page_size=64),
    replace(MANY, chunks=MANY.chunks[::3]),
    BOTH,
)
"""Tests of single promises, and `test_poison`, have the other edges."""

LOWERED = (*(case for case in CASES if case.name == "bf16 gqa 8"), BOTH, LARGE_CASES[-1])
"""Both head dims, and pages smaller than a block, of one and of several; head dim 64 without
options is lowered where the platform chooses."""


def check(case: Case, operation: Callable[..., jax.Array]) -> None:
    inputs = make_inputs(case, seed=1)
    actual = np.asarray(jax.jit(partial(operation, **case.options))(*inputs.operands))
    assert actual.dtype == inputs.q.dtype
    assert relative_error(actual, inputs.expected) <= LIMITS[case.dtype]
    assert not actual[inputs.cu_q_lens[-1] :].any()


def test_enough_cases_are_taken():
    assert {case.head_dim for case in taken()} == {64, 128}
    assert {case.group for case in taken()} >= {1, 2, 8}


def test_tile_table():
    """The table has each row once, longest context first; the entries after them have no rows."""
    cu_pages, cu_q_lens, kv_lens = [0, 3, 3, 11, 12], [0, 150, 150, 200, 250], [150, 0, 500, 60]
    table = mosaic_gpu._tile_table(6, 384, *map(jnp.asarray, (cu_pages, cu_q_lens, kv_lens)))
    assert np.asarray(table).tolist() == [
        [128, 22, 72, 428, 3],
        [128, 0, 22, 128, 0],
        [0, 0, 128, 0, 0],
        [128, 72, 122, -62, 11],
        [256, 0, 128, -378, 12],
        [128, 122, 128, -506, 12],
    ]
    nothing = mosaic_gpu._tile_table(5, 128, *(jnp.zeros(n, jnp.int32) for n in (5, 5, 4)))
    assert [end > begin for _, begin, end, *_ in nothing.tolist()] == [True, *[False] * 4]


@needs_gpu_interpreter
@pytest.mark.parametrize("case", INTERPRETED, ids=name_of)
def test_kernel(case: Case):
    """Of one KV head and one query: each is a piece of work."""
    check(replace(case, kv_heads=1, group=1), interpreted())


@needs_gpu_interpreter
def test_kernel_tells_heads_apart():
    check(replace(SMALL, kv_heads=2, group=2, page_size=8), interpreted())


@needs_gpu_interpreter
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernel_reuses_its_rings_without_races(head_dim: int, capsys: pytest.CaptureFixture[str]):
    """Keys end with a block, so that no V must be cleared: both warpgroups clear the same memory,
    with the same result, which the detector calls a race. Chunks end with a tile, so that results
    leave through one of two layouts: it takes these for one memory, although halves are apart."""
    chunks = ((128, 640), (256, 256))
    case = replace(SMALL, chunks=chunks, kv_heads=1, group=1, head_dim=head_dim, padding=0)
    check(case, interpreted(detect_races=True))
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.parametrize("case", LOWERED, ids=name_of)
def test_kernel_lowers(case: Case):
    check_lowers(case)


def check_lowers(case: Case) -> None:
    operation = partial(prefill_attention, implementation="mosaic_gpu", **case.options)
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype)
        for x in make_inputs(replace(case, kv_heads=1), seed=0).operands
    ]
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=H100)
    with use_abstract_mesh(mesh):
        text = jax.jit(operation).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("platform", "case", "kernels"),
    [("cuda", SMALL, 1), ("cuda", replace(SMALL, dtype="float32"), 0), ("cpu", SMALL, 0)],
)
def test_the_platform_chooses_also_within_shard_map(platform: str, case: Case, kernels: int):
    """The kernel runs where it takes the arguments; elsewhere the reference runs."""
    mesh = AbstractMesh((2,), ("tp",), axis_types=(AxisType.Auto,), abstract_device=H100)
    heads, pool = PartitionSpec(None, "tp"), PartitionSpec("tp")
    run = jax.shard_map(
        partial(prefill_attention, **case.options),
        mesh=mesh,
        in_specs=(heads, pool, pool, *[PartitionSpec()] * 4),
        out_specs=heads,
        check_vma=False,
    )
    traced = jax.jit(run).trace(*make_inputs(case, seed=0).operands)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == kernels


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (replace(SMALL, dtype="float32"), "both be bfloat16, not float32"),
        (replace(SMALL, head_dim=256), "head dim must be 64 or 128, not 256"),
        (replace(SMALL, page_size=192), "or a multiple of 128, not 192"),
    ],
)
def test_the_kernel_refuses_with_the_reason(case: Case, reason: str):
    operands = make_inputs(case, seed=0).operands
    operation = partial(prefill_attention, scale=1.0, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=f"prefill_attention by mosaic_gpu: .*{reason}"):
        jax.eval_shape(operation, *operands)
