"""add_rms: every implementation against plain numpy, and the promises of its interface."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels.add_rms import mosaic_gpu
from pallas_kernels.add_rms.api import add_rms
from pallas_kernels.add_rms.cases import CASES, LARGE_CASES, Case, make_inputs

needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU is interpreted from JAX 0.11 on"
)
TAKEN = [case for case in CASES if mosaic_gpu.refusal(jnp.asarray(make_inputs(case, 0).x)) is None]


def check(case: Case, run: Callable[..., Any]) -> None:
    inputs = make_inputs(case, seed=1)
    total, scale = jax.jit(partial(run, **case.options))(*inputs.operands)
    np.testing.assert_array_equal(np.asarray(total), inputs.expected[0])
    # XLA may square the sum before it is rounded.
    tolerance = 1e-6 if case.dtype == "float32" else 1e-3
    np.testing.assert_allclose(np.asarray(scale), inputs.expected[1], rtol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference(case: Case):
    check(case, partial(add_rms, implementation="reference"))


@needs_gpu_interpreter
@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_gpu_kernel(case: Case):
    check(case, partial(mosaic_gpu.add_rms, interpret=plgpu.InterpretGPUParams()))


@pytest.mark.parametrize("case", [*TAKEN, *LARGE_CASES], ids=lambda case: case.name)
def test_gpu_kernel_lowers(case: Case):
    x = jax.ShapeDtypeStruct((case.tokens, case.model_dim), jnp.dtype(case.dtype))
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    run = jax.jit(partial(add_rms, implementation="mosaic_gpu", **case.options))
    with use_abstract_mesh(mesh):
        text = run.trace(x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": jnp.zeros((2, 65))}, "D = 65, but x has D = 64"),
        ({"y": jnp.zeros((2, 64), jnp.bfloat16)}, "y is bfloat16, but x is float32"),
        ({"x": jnp.zeros((2, 64), jnp.int32)}, "x must be of a floating type"),
        ({"eps": -1.0}, "eps must be .* -1.0"),
        ({"implementation": "fast"}, "one of reference, mosaic_gpu, not 'fast'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str):
    good = {"x": jnp.zeros((2, 64)), "y": jnp.zeros((2, 64)), "eps": 1e-5}
    arguments = {**good, **changes}
    with pytest.raises(ValueError, match=message):
        add_rms(arguments.pop("x"), arguments.pop("y"), **arguments)


def test_the_kernel_refuses_with_the_reason():
    with pytest.raises(NotImplementedError, match="multiple of 128, at most 8192, not 576"):
        add_rms(*[jnp.zeros((2, 576), jnp.bfloat16)] * 2, eps=0.0, implementation="mosaic_gpu")
