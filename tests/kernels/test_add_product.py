"""add_product: every implementation against plain numpy, and the promises of its interface."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels.errors import LIMITS, relative_error
from pallas_kernels.product import mosaic_gpu
from pallas_kernels.product.add_cases import CASES, LARGE_CASES, AddCase, make_inputs
from pallas_kernels.product.api import add_product

# Products with unwritten memory warn.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU is interpreted from JAX 0.11 on"
)
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")


def shapes(case: AddCase) -> list[jax.ShapeDtypeStruct]:
    sizes = ((case.tokens, case.columns), (case.tokens, case.depth), (case.depth, case.columns))
    return [jax.ShapeDtypeStruct(size, jnp.dtype(case.dtype)) for size in sizes]


def taken(case: AddCase) -> bool:
    refusal: Callable[..., str | None] = mosaic_gpu.add_refusal
    return refusal(*shapes(case)[1:]) is None


TAKEN = [case for case in CASES if taken(case)]
LOWERED = [TAKEN[0], TAKEN[-1], *LARGE_CASES[::3]]


def name_of(case: AddCase) -> str:
    return case.name.replace(" ", "_")


def check_sum(case: AddCase, operation: Callable[..., jax.Array], **plan: Any) -> None:
    inputs = make_inputs(case, seed=1)
    out = np.asarray(jax.jit(partial(operation, **plan))(*inputs.operands))
    assert out.dtype == inputs.x.dtype
    assert relative_error(out, inputs.expected[0]) <= LIMITS[case.dtype]


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference(case: AddCase, implementation: str | None):
    inputs = make_inputs(case, seed=1)
    run = jax.jit(partial(add_product, implementation=implementation, **case.options))
    total, scale = map(np.asarray, run(*inputs.operands))
    assert total.dtype == inputs.x.dtype
    assert relative_error(total, inputs.expected[0]) <= LIMITS[case.dtype]
    np.testing.assert_allclose(scale, inputs.expected[1], rtol=LIMITS[case.dtype])


def test_enough_cases_are_taken():
    assert {case.tokens for case in TAKEN} == {8, 64, 72, 128}


@needs_gpu_interpreter
@pytest.mark.parametrize("case", [TAKEN[0], TAKEN[-1]], ids=name_of)
def test_kernel(case: AddCase):
    """Where the depth is even, the product is in parts, which the interpreter does not join; then
    XLA adds the residual stream."""
    check_sum(case, mosaic_gpu.add_product, interpret=plgpu.InterpretGPUParams())


@needs_gpu_interpreter
@pytest.mark.parametrize("case", TAKEN[1:3], ids=name_of)
def test_kernel_of_blocks_that_take_several_tiles(
    case: AddCase, capsys: pytest.CaptureFixture[str]
):
    """The next tile's part of the residual stream is loaded where this tile's result is stored
    from."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    plan = {"programs": 2, "splits": 1, "tile": 64, "stages": 2}
    check_sum(case, mosaic_gpu.add_product, interpret=interpret, **plan)
    assert "RACE" not in capsys.readouterr().out


def lowered(case: AddCase, platform: str, implementation: str | None) -> str:
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=H100)
    run = jax.jit(partial(add_product, implementation=implementation, **case.options))
    with use_abstract_mesh(mesh):
        return run.trace(*shapes(case)).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("case", LOWERED, ids=name_of)
def test_kernel_lowers(case: AddCase):
    text = lowered(case, "cuda", "mosaic_gpu")
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("case", "platform", "kernel"),
    [
        (AddCase("wo", 16, 4096, 4096, "bfloat16"), "cuda", "few_rows"),
        (AddCase("wo", 64, 4096, 4096, "bfloat16"), "cuda", "few_rows"),
        (AddCase("wo", 128, 4096, 4096, "bfloat16"), "cuda", "add_rms"),
        (AddCase("wo", 8, 4096, 4096, "bfloat16"), "cuda", "add_rms"),
        (AddCase("narrow", 64, 2048, 2048, "bfloat16"), "cuda", "add_rms"),
        (AddCase("wo", 256, 4096, 4096, "bfloat16"), "cuda", "add_rms"),
        (AddCase("wo", 64, 4096, 4096), "cuda", ""),
        (AddCase("wo", 64, 4096, 4096, "bfloat16"), "cpu", ""),
    ],
)
def test_the_platform_chooses(case: AddCase, platform: str, kernel: str):
    """The kernel runs where it pays; elsewhere a product and add_rms run."""
    text = lowered(case, platform, None)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == (kernel != "")
    assert kernel in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": jnp.zeros((2, 65))}, "w .* has A = 64, but y has A = 65"),
        ({"x": jnp.zeros((2, 9))}, "w .* has B = 8, but x has B = 9"),
        ({"w": jnp.zeros((64, 8), jnp.bfloat16)}, "w is bfloat16, but x is float32"),
        ({"x": jnp.zeros((2, 8), jnp.int32)}, "x must be of a floating type"),
        ({"eps": float("nan")}, "eps must be a finite number >= 0, but it is nan"),
        ({"implementation": "fast"}, "one of reference, mosaic_gpu, not 'fast'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str):
    good = {"x": jnp.zeros((2, 8)), "y": jnp.zeros((2, 64)), "w": jnp.zeros((64, 8)), "eps": 0.0}
    with pytest.raises(ValueError, match=message):
        add_product(**{**good, **changes})


def test_the_kernel_refuses_with_the_reason():
    case = AddCase("many", 192, 64, 128, "bfloat16")
    run = partial(add_product, implementation="mosaic_gpu", **case.options)
    message = "add_product by mosaic_gpu: .*multiple of 8, at most 128, not 192"
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(run, *shapes(case))
