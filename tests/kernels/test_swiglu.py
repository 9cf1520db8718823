"""swiglu: every implementation against plain numpy, and the promises of its interface.

Pallas' interpreter takes a thread of XLA for each of a kernel's three warpgroups; conftest's
sixteen devices provide enough.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

from pallas_kernels.errors import SWIGLU_LIMITS, swiglu_error
from pallas_kernels.swiglu import mosaic_gpu
from pallas_kernels.swiglu.api import swiglu
from pallas_kernels.swiglu.cases import CASES, LARGE_CASES, Case, make_inputs

# Products with unwritten memory warn.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU is interpreted from JAX 0.11 on"
)
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")


def shapes(case: Case) -> tuple[jax.ShapeDtypeStruct, ...]:
    dtype = jnp.dtype(case.dtype)
    return (
        jax.ShapeDtypeStruct((case.tokens, case.model_dim), dtype),
        jax.ShapeDtypeStruct((case.tokens,), jnp.float32),
        jax.ShapeDtypeStruct((case.model_dim, 2, case.mlp_dim), dtype),
    )


def taken(case: Case) -> bool:
    refusal: Callable[..., str | None] = mosaic_gpu.refusal
    x, _, w_gate_up = shapes(case)
    return refusal(x, w_gate_up) is None


TAKEN = [case for case in CASES if taken(case)]
RAGGED = TAKEN[-1]
PLAIN = ("bf16 64", "bf16 72", "bf16 256")
LOWERED = [
    *(case for case in TAKEN if case.name in ("bf16 8", "bf16 256", "bf16 normed 128")),
    *(case for case in LARGE_CASES if case.name.endswith((" 128", "normed 64", "8k", "2k"))),
]
"""Cases of few rows, of their scale and without, and of many; with tiles of every width."""


def name_of(case: Case) -> str:
    return case.name.replace(" ", "_")


def interpreted(*, races: bool = False, **plan: Any) -> Callable[..., jax.Array]:
    interpreter = plgpu.InterpretGPUParams(detect_races=races)
    return partial(mosaic_gpu.swiglu, interpret=interpreter, **plan)


def check(case: Case, operation: Callable[..., jax.Array]) -> None:
    inputs = make_inputs(case, seed=1)
    out = np.asarray(jax.jit(partial(operation, **case.options))(*inputs.operands))
    assert out.dtype == inputs.x.dtype
    assert swiglu_error(inputs, out) <= SWIGLU_LIMITS[case.dtype]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference(case: Case):
    check(case, partial(swiglu, implementation="reference"))


def test_enough_cases_are_taken():
    assert {case.tokens for case in TAKEN} == {8, 64, 72, 128, 256, 320}


@needs_gpu_interpreter
@pytest.mark.parametrize("case", [case for case in TAKEN if case.name in PLAIN], ids=name_of)
def test_kernel(case: Case):
    """There are two blocks of threads, so that each takes several tiles and reuses its ring. The
    numbers of other cases are held to the limits by the tests of races, and by `test_poison`."""
    check(case, interpreted(programs=2))


@needs_gpu_interpreter
def test_kernel_of_few_rows_takes_their_scale_itself():
    [case] = [case for case in TAKEN if case.name == "bf16 normed 8"]
    x, scale, w = make_inputs(case, seed=2).operands
    run = jax.jit(partial(interpreted(programs=2), **case.options))
    with_nothing = run(x, np.full_like(scale, np.nan), w)
    np.testing.assert_array_equal(np.asarray(with_nothing), np.asarray(run(x, scale, w)))


@needs_gpu_interpreter
def test_kernel_of_another_plan():
    check(RAGGED, interpreted(programs=3, band=1))


@needs_gpu_interpreter
@pytest.mark.parametrize(
    "case", [RAGGED, *(case for case in TAKEN if case.eps is not None)], ids=name_of
)
def test_kernel_reuses_its_rings_without_races(case: Case, capsys: pytest.CaptureFixture[str]):
    check(case, interpreted(programs=2, stages=2, races=True))
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.parametrize("case", LOWERED, ids=name_of)
def test_kernel_lowers(case: Case):
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=H100)
    run = jax.jit(partial(swiglu, implementation="mosaic_gpu", **case.options))
    with use_abstract_mesh(mesh):
        text = run.trace(*shapes(case)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("platform", "tokens", "dtype", "kernels"),
    [
        ("cuda", 1024, "bfloat16", 1),
        ("cuda", 512, "bfloat16", 0),
        ("cuda", 128, "bfloat16", 1),
        ("cuda", 16, "bfloat16", 0),
        ("cuda", 1024, "float32", 0),
        ("cpu", 1024, "bfloat16", 0),
    ],
)
def test_the_platform_chooses_also_within_shard_map(
    platform: str, tokens: int, dtype: str, kernels: int
):
    """The kernel runs where it takes the arguments and pays; elsewhere the reference runs."""
    mesh = AbstractMesh((2,), ("tp",), axis_types=(AxisType.Auto,), abstract_device=H100)
    run = jax.shard_map(
        swiglu,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(None, None, "tp")),
        out_specs=PartitionSpec(None, "tp"),
        check_vma=False,
    )
    traced = jax.jit(run).trace(*shapes(Case("split", tokens, 128, 2 * 14336, dtype)))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == kernels


@pytest.mark.parametrize(
    ("tokens", "mlp_dim", "normed", "pays"),
    [
        (8, 14336, True, False),
        (16, 14336, False, False),
        (16, 14336, True, True),
        (64, 14336, False, True),
        (128, 14336, False, True),
        (128, 4096, False, False),  # tiles of 64 columns keep 64 processors busy
        (512, 14336, True, False),
        (1024, 14336, False, True),
        (1024, 7168, True, False),  # half of it: 448 tiles keep 132 processors busy for 3.4 turns
        (1024, 8192, False, True),
        (2048, 7168, False, True),
        (8192, 14336, False, True),
        (1024, 96, True, False),  # narrower than a tile
        (1000, 14336, False, False),  # not a multiple of rows that the kernel takes
    ],
)
def test_the_kernel_pays_where_xla_was_slower(tokens: int, mlp_dim: int, normed: bool, pays: bool):
    ask: Callable[..., bool] = mosaic_gpu.pays
    x, _, w_gate_up = shapes(Case("any", tokens, 64, mlp_dim, "bfloat16"))
    assert ask(x, w_gate_up, normed=normed) == pays


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((2, 65))}, "D = 64, but x has D = 65"),
        ({"scale": jnp.ones(3)}, "scale .* has T = 3, but x has T = 2"),
        ({"scale": jnp.ones(2, jnp.bfloat16)}, "scale must be float32"),
        ({"w_gate_up": jnp.zeros((64, 3, 8))}, r"must be \[D, 2, F\], but its shape is"),
        ({"w_gate_up": jnp.zeros((64, 2, 8), jnp.bfloat16)}, "is bfloat16, but x is float32"),
        ({"x": jnp.zeros((2, 64), jnp.int32)}, "x must be of a floating type"),
        ({"eps": -1.0}, "eps must be a finite number >= 0, but it is -1.0"),
        ({"implementation": "fast"}, "one of reference, mosaic_gpu, not 'fast'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str):
    good = {"x": jnp.zeros((2, 64)), "scale": jnp.ones(2), "w_gate_up": jnp.zeros((64, 2, 8))}
    with pytest.raises(ValueError, match=message):
        swiglu(**{**good, **changes})


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("f32", 64, 64, 128, "float32"), "both be bfloat16, not float32"),
        (
            Case("rows", 65, 64, 128, "bfloat16"),
            "multiple of 8, at most 128, not 65",
        ),
        (Case("more rows", 200, 64, 128, "bfloat16"), "tokens must be a multiple of 64, not 200"),
        (Case("narrow", 64, 64, 96, "bfloat16"), "columns of 64, not 64 and 96"),
        (Case("narrow", 192, 64, 192, "bfloat16"), "MLP dim of 128, not 64 and 192"),
    ],
)
def test_the_kernel_refuses_with_the_reason(case: Case, reason: str):
    operation = partial(swiglu, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=f"swiglu by mosaic_gpu: .*{reason}"):
        jax.eval_shape(operation, *shapes(case))


def test_gelu_is_of_the_reference_alone():
    """Where no kernel takes the activation, None is the reference, and a kernel's name raises."""
    inputs = make_inputs(CASES[0], seed=2)
    x, scale, w = map(jnp.asarray, inputs.operands)
    gate, up = np.moveaxis(np.einsum("td,duf->tuf", x, w) * inputs.operands[1][:, None, None], 1, 0)
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    found = swiglu(x, scale, w, activation="gelu_tanh")
    np.testing.assert_allclose(found, gelu * up, rtol=1e-3, atol=1e-4)
    with pytest.raises(NotImplementedError, match="the activation must be silu, not gelu_tanh"):
        swiglu(x, scale, w, activation="gelu_tanh", implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="activation must be one of silu, gelu_tanh, not 'relu'"):
        swiglu(x, scale, w, activation="relu")
