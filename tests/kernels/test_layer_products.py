"""layer_products: every implementation against plain numpy, and what the interface promises."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels.check import LIMITS, layer_error
from pallas_kernels.layer_products import mosaic_gpu
from pallas_kernels.layer_products.api import layer_products
from pallas_kernels.layer_products.cases import CASES, LARGE_CASES, Case, make_inputs
from pallas_kernels.layer_products.mosaic_gpu_plan import Plan

# Of products with memory that nobody wrote.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU is interpreted from JAX 0.11 on"
)
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")


def shapes(case: Case) -> tuple[jax.ShapeDtypeStruct, ...]:
    dtype = jnp.dtype(case.dtype)
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in case.shapes)


TAKEN = [case for case in CASES if mosaic_gpu.refusal(*shapes(case)) is None]  # type: ignore[arg-type]


def name_of(case: Case) -> str:
    return case.name.replace(" ", "_")


def check(case: Case, operation: Callable[..., tuple[jax.Array, ...]]) -> None:
    inputs = make_inputs(case, seed=1)
    run = jax.jit(partial(operation, **case.options))
    outputs = tuple(np.asarray(x) for x in run(*inputs.operands))
    assert [x.dtype for x in outputs[::2]] == [inputs.operands[0].dtype] * len(outputs[::2])
    assert layer_error(inputs, outputs) <= LIMITS[case.dtype]


def interpreted(*, races: bool = False, **plan: Any) -> Callable[..., tuple[jax.Array, ...]]:
    interpreter = plgpu.InterpretGPUParams(detect_races=races)
    return partial(mosaic_gpu.layer_products, interpret=interpreter, **plan)


def lowered(case: Case, platform: str = "cuda", **options: Any) -> str:
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=H100)
    run = jax.jit(partial(layer_products, **case.options, **options))
    with use_abstract_mesh(mesh):
        return run.trace(*shapes(case)).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference(case: Case):
    check(case, partial(layer_products, implementation="reference"))


def test_enough_cases_are_taken():
    assert {case.tokens for case in TAKEN} == {1, 8, 16, 64, 72, 128}


@needs_gpu_interpreter
@pytest.mark.parametrize("case", TAKEN, ids=name_of)
def test_kernel(case: Case):
    """Of few blocks, each of which takes several units of work, and rings that are soon full."""
    check(case, interpreted(blocks=3, stages=2))


@needs_gpu_interpreter
def test_kernel_races(capsys: pytest.CaptureFixture[str]):
    check(TAKEN[0], interpreted(blocks=2, stages=2, races=True))
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.parametrize("case", [*TAKEN, *LARGE_CASES], ids=name_of)
def test_kernel_lowers(case: Case):
    text = lowered(case, implementation="mosaic_gpu")
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


def test_plan_of_llama():
    """Every block has work in every product, but for a few, and about as much to read."""
    plan = Plan(64, 4096, 4096, 14336, 6144, 1e-5)
    assert [x.units for x in plan.products] == [128, 112, 128, 120]
    assert [x.longest(plan.blocks) for x in plan.products] == [8, 64, 28, 13]
    assert [plan.arrivals(*step) for step in plan.steps] == [128, 64, 112, 128, 64, 120, 64]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wo": jnp.zeros((65, 32))}, "A = 65, but o has A = 64"),
        ({"wqkv": jnp.zeros((33, 8))}, "wqkv \\[D, C\\] has D = 33, but x has D = 32"),
        ({"w_gate_up": jnp.zeros((32, 1, 48))}, "must be \\[D, 2, F\\], but its shape"),
        ({"o": jnp.zeros((2, 64), jnp.bfloat16)}, "o is bfloat16, but x is float32"),
        ({"eps": -1.0}, "eps must be a finite number >= 0, but it is -1.0"),
        ({"implementation": "fast"}, "one of reference, mosaic_gpu, not 'fast'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str):
    good = {
        "o": jnp.zeros((2, 64)),
        "x": jnp.zeros((2, 32)),
        "wo": jnp.zeros((64, 32)),
        "w_gate_up": jnp.zeros((32, 2, 48)),
        "w_down": jnp.zeros((48, 32)),
        "wqkv": jnp.zeros((32, 8)),
        "eps": 1e-5,
    }
    with pytest.raises(ValueError, match=message):
        layer_products(**{**good, **changes})


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("f32", 8, 128, 128, 128, 128), "x must be bfloat16, not float32"),
        (Case("many", 136, 128, 128, 128, 128, "bfloat16"), "at most 128 tokens, not 136"),
        (Case("odd", 8, 128, 128, 192, 128, "bfloat16"), "multiple of 128, not 128, 128, 192, 128"),
        (Case("long", 8, 128, 8320, 128, 128, "bfloat16"), "at most 8192, not 8320"),
    ],
)
def test_the_kernel_refuses_with_the_reason(case: Case, reason: str):
    operation = partial(layer_products, implementation="mosaic_gpu", **case.options)
    with pytest.raises(NotImplementedError, match=f"layer_products by mosaic_gpu: .*{reason}"):
        jax.eval_shape(operation, *shapes(case))
