"""product: every implementation against plain numpy, and the promises of its interface."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels import few_rows
from pallas_kernels.errors import LIMITS, attention_error
from pallas_kernels.product import mosaic_gpu
from pallas_kernels.product.api import product
from pallas_kernels.product.cases import CASES, LARGE_CASES, Case, make_inputs

# Products with unwritten memory warn.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU is interpreted from JAX 0.11 on"
)
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")


def shapes(case: Case) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    dtype = jnp.dtype(case.dtype)
    return (
        jax.ShapeDtypeStruct((case.tokens, case.depth), dtype),
        jax.ShapeDtypeStruct((case.depth, case.columns), dtype),
    )


def taken(case: Case) -> bool:
    refusal: Callable[..., str | None] = mosaic_gpu.refusal
    return refusal(*shapes(case)) is None


TAKEN = [case for case in CASES if taken(case)]
LOWERED = [TAKEN[0], TAKEN[-1], *LARGE_CASES[::4]]
"""Cases of each number of tokens, each with a depth and columns of its own."""


def name_of(case: Case) -> str:
    return case.name.replace(" ", "_")


def check(case: Case, operation: Callable[..., jax.Array]) -> None:
    inputs = make_inputs(case, seed=1)
    out = np.asarray(jax.jit(operation)(*inputs.operands))
    assert out.dtype == inputs.x.dtype
    assert attention_error(inputs, out) <= LIMITS[case.dtype]


def interpreted(*, races: bool = False, **plan: Any) -> Callable[..., jax.Array]:
    interpreter = plgpu.InterpretGPUParams(detect_races=races)
    return partial(mosaic_gpu.product, interpret=interpreter, **plan)


def lowered(case: Case, platform: str = "cuda", **options: Any) -> str:
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=H100)
    run = jax.jit(partial(product, **options))
    with use_abstract_mesh(mesh):
        return run.trace(*shapes(case)).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference(case: Case):
    check(case, partial(product, implementation="reference"))


def test_enough_cases_are_taken():
    assert {case.tokens for case in TAKEN} == {8, 64, 72, 128}


@needs_gpu_interpreter
@pytest.mark.parametrize("case", TAKEN[1:3], ids=name_of)
def test_kernel(case: Case):
    """Where the depth is even, the product is in parts, which the interpreter does not join. Few
    tokens are in `test_poison`, the most in the next test."""
    check(case, interpreted())


@needs_gpu_interpreter
def test_kernel_of_blocks_that_take_several_tiles(capsys: pytest.CaptureFixture[str]):
    check(TAKEN[-1], interpreted(programs=2, splits=1, tile=64, stages=2, races=True))
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.parametrize("case", LOWERED, ids=name_of)
def test_kernel_lowers(case: Case):
    text = lowered(case, implementation="mosaic_gpu")
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("depth", "columns", "tile", "splits"),
    [
        (4096, 4096, 64, 2),
        (14336, 4096, 64, 2),
        (4096, 6144, 128, 2),
        (4096, 28672, 128, 1),
        (64, 4096, 64, 1),  # nothing to cut
    ],
)
def test_plans(depth: int, columns: int, tile: int, splits: int):
    plan = few_rows.plan_of(64, depth, 1, columns)
    assert (plan.tile, plan.splits) == (tile, splits)
    assert plan.splits == 1 or plan.tiles * plan.splits <= 132


@pytest.mark.parametrize(
    ("case", "platform", "kernels"),
    [
        (Case("wo", 64, 4096, 4096, "bfloat16"), "cuda", 1),
        (Case("wo", 64, 4096, 4096, "bfloat16"), "cpu", 0),
        (Case("wo", 64, 4096, 4096), "cuda", 0),
        (Case("wo", 16, 4096, 4096, "bfloat16"), "cuda", 0),
        (Case("wo", 128, 4096, 4096, "bfloat16"), "cuda", 0),
        (Case("qkv", 64, 4096, 6144, "bfloat16"), "cuda", 0),
        (Case("odd", 64, 4096, 4095, "bfloat16"), "cuda", 0),
    ],
)
def test_the_platform_chooses(case: Case, platform: str, kernels: int):
    """The kernel runs where it takes the arguments and pays; elsewhere the reference runs."""
    assert lowered(case, platform).count("stablehlo.custom_call @mosaic_gpu") == kernels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((2, 65))}, "A = 64, but x has A = 65"),
        ({"w": jnp.zeros((64, 8), jnp.bfloat16)}, "w is bfloat16, but x is float32"),
        ({"x": jnp.zeros((2, 64), jnp.int32)}, "x must be of a floating type"),
        ({"implementation": "fast"}, "one of reference, mosaic_gpu, not 'fast'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str):
    good = {"x": jnp.zeros((2, 64)), "w": jnp.zeros((64, 8))}
    with pytest.raises(ValueError, match=message):
        product(**{**good, **changes})


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("f32", 64, 64, 128), "both be bfloat16, not float32"),
        (Case("many", 192, 64, 128, "bfloat16"), "multiple of 8, at most 128, not 192"),
        (Case("narrow", 64, 64, 96, "bfloat16"), "columns of 64, not 64 and 96"),
    ],
)
def test_the_kernel_refuses_with_the_reason(case: Case, reason: str):
    operation = partial(product, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=f"product by mosaic_gpu: .*{reason}"):
        jax.eval_shape(operation, *shapes(case))
