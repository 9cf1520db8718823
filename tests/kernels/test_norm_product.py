"""norm_product: every implementation against plain numpy, and what the interface promises."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels.check import LIMITS, relative_error
from pallas_kernels.product import mosaic_gpu
from pallas_kernels.product.api import norm_product
from pallas_kernels.product.norm_cases import CASES, LARGE_CASES, NormCase, make_inputs

# Of products with memory that nobody wrote.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU is interpreted from JAX 0.11 on"
)
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")


def shapes(case: NormCase) -> list[jax.ShapeDtypeStruct]:
    dtype = jnp.dtype(case.dtype)
    return [
        jax.ShapeDtypeStruct((case.tokens, case.depth), dtype),
        jax.ShapeDtypeStruct((case.tokens,), jnp.float32),
        jax.ShapeDtypeStruct((case.depth, case.columns), dtype),
    ]


def taken(case: NormCase) -> bool:
    refusal: Callable[..., str | None] = mosaic_gpu.norm_refusal
    x, _, w = shapes(case)
    return refusal(x, w) is None


TAKEN = [case for case in CASES if taken(case)]


def name_of(case: NormCase) -> str:
    return case.name.replace(" ", "_")


def check(case: NormCase, operation: Callable[..., Any], *, blind: bool = False) -> None:
    inputs = make_inputs(case, seed=1)
    x, scale, w = inputs.operands
    given = np.full_like(scale, np.nan) if blind else scale
    out, left = jax.jit(partial(operation, **case.options))(x, given, w)
    assert out.dtype == x.dtype
    normed = np.asarray(out).astype(np.float32) * np.asarray(left)[:, None]
    assert relative_error(normed, inputs.expected) <= LIMITS[case.dtype]


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference(case: NormCase, implementation: str | None):
    check(case, partial(norm_product, implementation=implementation))


def test_enough_cases_are_taken():
    assert {case.tokens for case in TAKEN} == {8, 64, 72, 128}


@needs_gpu_interpreter
@pytest.mark.parametrize("case", TAKEN, ids=name_of)
@pytest.mark.parametrize("splits", [1, 2])
def test_kernel_takes_the_scale_itself(
    case: NormCase, splits: int, capsys: pytest.CaptureFixture[str]
):
    """The interpreter does not join parts of the depth, and XLA scales their sum."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    if case.depth % (64 * splits):
        splits = 1
    plan: dict[str, Any] = {"programs": 2 if splits == 1 else 132, "splits": splits, "stages": 2}
    check(case, partial(mosaic_gpu.norm_product, interpret=interpret, **plan), blind=True)
    assert "RACE" not in capsys.readouterr().out


def lowered(case: NormCase, platform: str, implementation: str | None) -> str:
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=H100)
    run = jax.jit(partial(norm_product, implementation=implementation, **case.options))
    with use_abstract_mesh(mesh):
        return run.trace(*shapes(case)).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("case", [*TAKEN, *LARGE_CASES], ids=name_of)
def test_kernel_lowers(case: NormCase):
    text = lowered(case, "cuda", "mosaic_gpu")
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("case", "platform", "kernels"),
    [
        (NormCase("qkv", 16, 4096, 6144, "bfloat16"), "cuda", 1),
        (NormCase("qkv", 64, 4096, 6144, "bfloat16"), "cuda", 1),
        (NormCase("qkv", 128, 4096, 6144, "bfloat16"), "cuda", 0),
        (NormCase("qkv", 8, 4096, 6144, "bfloat16"), "cuda", 0),
        (NormCase("narrow", 64, 2048, 3072, "bfloat16"), "cuda", 0),
        (NormCase("qkv", 64, 4096, 6144), "cuda", 0),
        (NormCase("qkv", 64, 4096, 6144, "bfloat16"), "cpu", 0),
    ],
)
def test_the_platform_chooses(case: NormCase, platform: str, kernels: int):
    """The kernel where it pays; else a product, and the scale is left to who asked."""
    text = lowered(case, platform, None)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == kernels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((2, 65))}, "A = 64, but x has A = 65"),
        ({"scale": jnp.ones(3)}, "scale .* has T = 3, but x has T = 2"),
        ({"scale": jnp.ones(2, jnp.bfloat16)}, "scale must be float32"),
        ({"w": jnp.zeros((64, 8), jnp.bfloat16)}, "w is bfloat16, but x is float32"),
        ({"eps": -1.0}, "eps must be a finite number >= 0, but it is -1.0"),
        ({"implementation": "fast"}, "one of reference, mosaic_gpu, not 'fast'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str):
    good = {"x": jnp.zeros((2, 64)), "scale": jnp.ones(2), "w": jnp.zeros((64, 8)), "eps": 0.0}
    with pytest.raises(ValueError, match=message):
        norm_product(**{**good, **changes})
