"""rope_and_write: every implementation against plain numpy, and the promises of its interface."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels.errors import LIMITS, write_error
from pallas_kernels.kv_write import api, mosaic_gpu, mosaic_tpu
from pallas_kernels.kv_write.api import rope_and_write
from pallas_kernels.kv_write.cases import CASES, LARGE_CASES, Case, make_inputs
from tests.helpers.kernel_cases import without

needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU is interpreted from JAX 0.11 on"
)
SMALL = Case("small", ((0, 3), (15, 2)), padding=2)
REPEATED = (*("one prompt", "chunks", "in no order", "page 64", "bf16 page 128", "bf16 gqa 3"),)
"""Cases whose edges others have, which are neither interpreted nor lowered."""
LESS = (
    *("decode", "decode with idle rows", "smollm2", "padded", "bias", "page 128", "head dim 128"),
    *("bf16", "bf16 gqa 8"),
)
"""Cases that are lowered for TPUs, but not interpreted: others have several of their edges at
once."""
TPUS = {
    "v5e": AbstractDevice("TPU v5 lite", 1, platform="tpu"),
    "v6e": AbstractDevice("TPU v6 lite", 1, platform="tpu"),
}


def name_of(case: Case) -> str:
    return case.name.replace(" ", "_")


def check(case: Case, run: Callable[..., Any]) -> None:
    inputs = make_inputs(case, seed=1)
    outputs = jax.tree.map(np.asarray, jax.jit(run)(*inputs.operands))
    types = inputs.qkv.dtype, inputs.k_pages.dtype, inputs.v_pages.dtype
    for actual, expected, dtype in zip(outputs, inputs.expected, types, strict=True):
        assert actual.shape == expected.shape and actual.dtype == dtype
    assert write_error(inputs, outputs) <= LIMITS[case.dtype]


def fewer(cases: list[Case]) -> list[Case]:
    """Shorten the chunks of cases, which still begin, end and lie within pages, and cross them."""
    chunks = ((0, 20), (16, 1), (13, 3), (60, 24), (5, 0), (31, 2))
    return [case if case.tokens < 60 else replace(case, chunks=chunks) for case in cases]


def interpreted_tpu(**options: Any) -> Callable[..., Any]:
    return partial(mosaic_tpu.rope_and_write, interpret=pltpu.InterpretParams(**options))


def interpreted_gpu(**options: Any) -> Callable[..., Any]:
    return partial(mosaic_gpu.rope_and_write, interpret=plgpu.InterpretGPUParams(**options))


def taken_by(kernel: Any, *cases: Case) -> list[Case]:
    """List the cases that a kernel does not refuse."""
    taken = []
    for case in cases:
        inputs = make_inputs(case, seed=0)
        if kernel.refusal(inputs.qkv, inputs.k_pages, inputs.slot_mapping) is None:
            taken.append(case)
    return taken


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference(case: Case):
    check(case, rope_and_write)


@pytest.mark.smoke
def test_reference_on_a_small_case():
    check(SMALL, partial(rope_and_write))


@pytest.mark.parametrize(
    "case",
    fewer(taken_by(mosaic_tpu, *without(CASES, *REPEATED, *LESS))),
    ids=name_of,
)
def test_tpu_kernel(case: Case):
    check(case, interpreted_tpu())


@pytest.mark.smoke
def test_tpu_kernel_on_a_small_case():
    check(SMALL, interpreted_tpu())


@pytest.mark.parametrize("shuffled", [False, True])
def test_tpu_kernel_shares_tiles_between_blocks_without_races(
    monkeypatch: pytest.MonkeyPatch, shuffled: bool
):
    """Blocks of 16 tokens end within tiles; the last block is not full."""
    monkeypatch.setattr(mosaic_tpu, "_MAX_BLOCK_TOKENS", 16)
    case = Case("4 blocks", ((3, 50),), padding=5, kv_heads=1, group=1, shuffled=shuffled)
    check(case, interpreted_tpu(detect_races=True))


@pytest.mark.parametrize(
    ("hardware", "case"),
    [
        pytest.param(hardware, case, id=f"{hardware}-{name_of(case)}")
        for first, hardware in enumerate(("v6e", "v5e"))  # they hardly differ
        for case in taken_by(mosaic_tpu, *without(CASES, *REPEATED), LARGE_CASES[-1])[
            2 * first :: 4
        ]
    ],
)
def test_tpu_kernel_lowers(hardware: str, case: Case):
    run = partial(rope_and_write, implementation="mosaic_tpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=TPUS[hardware])
    with use_abstract_mesh(mesh):
        traced = jax.jit(run, donate_argnums=(5, 6)).trace(*make_inputs(case, seed=0).operands)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text
    assert text.count("output_operand_alias<") == 2


@needs_gpu_interpreter
@pytest.mark.parametrize(
    "case",
    fewer([case for case in CASES if case.name in ("bf16 gqa 8", "bf16 gqa 3")]),
    ids=name_of,
)
def test_gpu_kernel(case: Case):
    """Both head dims. The test of races has an order that is none, `test_poison` padding."""
    check(case, interpreted_gpu())


@needs_gpu_interpreter
@pytest.mark.parametrize("shuffled", [False, True])
def test_gpu_kernel_has_no_races(shuffled: bool, capsys: pytest.CaptureFixture[str]):
    """Runs of 8 tokens lie within a page and across its edge; the last run has 3 tokens."""
    group = 2 if shuffled else 1
    case = Case("runs", ((3, 67),), kv_heads=1, group=group, dtype="bfloat16", shuffled=shuffled)
    check(case, interpreted_gpu(detect_races=True))
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in ("bf16 gqa 8", "bf16 gqa 3")],
    ids=name_of,
)
def test_gpu_kernel_lowers(case: Case):
    """Both head dims, groups of an even and an odd number, and a bias; the rest of a case is in its
    numbers."""
    run = partial(rope_and_write, implementation="mosaic_gpu")
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with use_abstract_mesh(mesh):
        traced = jax.jit(run, donate_argnums=(5, 6)).trace(*make_inputs(case, seed=0).operands)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert text.count("output_operand_alias<") == 2


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (SMALL, "both be bfloat16, not float32 and float32"),
        (replace(SMALL, dtype="bfloat16", qkv_dtype="float16"), "not float16 and bfloat16"),
        (replace(SMALL, dtype="bfloat16", head_dim=256), "must be 64 or 128, not 256"),
    ],
)
def test_the_gpu_kernel_refuses_with_the_reason(case: Case, reason: str):
    operands = make_inputs(case, seed=0).operands
    run = partial(rope_and_write, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=f"rope_and_write by mosaic_gpu: .*{reason}"):
        jax.eval_shape(run, *operands)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (replace(SMALL, qkv_dtype="float16"), "qkv must be float32 or bfloat16, not float16"),
        (replace(SMALL, dtype="float16", qkv_dtype="float32"), "the pages .*, not float16"),
        (replace(SMALL, page_size=8, dtype="bfloat16"), "of bfloat16 .* multiple of 16, not 8"),
        (replace(SMALL, head_dim=32), "head dim must be a multiple of 64, not 32"),
        (replace(SMALL, kv_heads=80, group=1), "16 tokens exceed the buffers"),
        (replace(SMALL, padding=44_000, kv_heads=1, group=1), "44005 tokens"),
    ],
)
def test_the_tpu_kernel_refuses_with_the_reason(case: Case, reason: str):
    operands = make_inputs(case, seed=0).operands
    run = partial(rope_and_write, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match=f"rope_and_write by mosaic_tpu: .*{reason}"):
        jax.eval_shape(run, *operands)


def test_the_platform_chooses_among_the_proven(monkeypatch: pytest.MonkeyPatch):
    """A kernel runs where it is proven and takes the arguments; elsewhere the reference runs."""
    monkeypatch.setitem(api._PROVEN, "tpu", "mosaic_tpu")

    def kernels_on(platform: str, case: Case) -> int:
        mesh = AbstractMesh((1,), ("x",), abstract_device=TPUS["v5e"])
        with use_abstract_mesh(mesh):
            traced = jax.jit(partial(rope_and_write)).trace(*make_inputs(case, seed=0).operands)
            return traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")

    assert kernels_on("tpu", SMALL) == 1
    assert kernels_on("cpu", SMALL) == 0
    assert kernels_on("tpu", replace(SMALL, head_dim=32)) == 0
    check(SMALL, partial(rope_and_write))


@pytest.mark.parametrize("proven", [False, True])
@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param(
            "bfloat16",
            marks=pytest.mark.skipif(
                jax.__version_info__ < (0, 11), reason="XLA on the CPU widened such pools"
            ),
        ),
    ],
)
def test_donated_pools_are_written_in_place(
    monkeypatch: pytest.MonkeyPatch, dtype: str, proven: bool
):
    """The results are the pools, and no other array of a pool's size is made, even where the
    platform must choose."""
    if proven:
        monkeypatch.setitem(api._PROVEN, "tpu", "mosaic_tpu")
    inputs = make_inputs(Case("deep", ((4000, 9), (100, 1)), dtype=dtype), seed=0)
    run = jax.jit(partial(rope_and_write), donate_argnums=(5, 6))
    memory = run.lower(*inputs.operands).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == inputs.k_pages.nbytes + inputs.v_pages.nbytes
    assert memory.temp_size_in_bytes < inputs.k_pages.nbytes // 10


def test_heads_may_be_split():
    """Half of the KV heads gives half of the results."""
    case = Case("split", ((0, 20),), kv_heads=4, bias=True)
    inputs = make_inputs(case, seed=2)
    q, k, v = jax.jit(rope_and_write)(*inputs.operands)
    assert inputs.bias is not None
    half_q, half_k, half_v = jax.jit(rope_and_write)(
        inputs.qkv[:, 2:],
        inputs.scale,
        inputs.bias[2:],
        inputs.cos,
        inputs.sin,
        inputs.k_pages[2:],
        inputs.v_pages[2:],
        inputs.slot_mapping,
    )
    np.testing.assert_array_equal(half_q, q[:, q.shape[1] // 2 :])
    np.testing.assert_array_equal(half_k, k[2:])
    np.testing.assert_array_equal(half_v, v[2:])


def arguments(**changes: Any) -> dict[str, Any]:
    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    good = {
        "qkv": shape((5, 2, 6, 64), f32),
        "scale": shape((5,), f32),
        "bias": shape((2, 6, 64), f32),
        "cos": shape((5, 32), f32),
        "sin": shape((5, 32), f32),
        "k_pages": shape((2, 9, 16, 64), f32),
        "v_pages": shape((2, 9, 16, 64), f32),
        "slot_mapping": shape((5,), jnp.int32),
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("qkv", (5, 2, 6), "float32", r"qkv must be \[T, K, J, H\].*\(5, 2, 6\)"),
        ("qkv", (5, 2, 6, 64), "int8", "qkv must be of a floating type, but it is int8"),
        ("scale", (4,), "float32", "scale .* T = 4, but qkv has T = 5"),
        ("scale", (5,), "bfloat16", "scale must be float32, but it is bfloat16"),
        ("bias", (2, 5, 64), "float32", "bias .* J = 5, but qkv has J = 6"),
        ("bias", (2, 6, 64), "int32", "bias must be of a floating type, but it is int32"),
        ("sin", (5, 16), "float32", "sin .* I = 16, but cos has I = 32"),
        ("k_pages", (4, 9, 16, 64), "float32", "k_pages .* K = 4, but qkv has K = 2"),
        ("v_pages", (2, 9, 16, 64), "bfloat16", "v_pages is bfloat16, but k_pages is float32"),
        ("slot_mapping", (5,), "int16", "slot_mapping must be int32, but it is int16"),
        ("slot_mapping", (5, 1), "int32", r"slot_mapping must be \[T\].*\(5, 1\)"),
    ],
)
def test_bad_arguments_are_named(name: str, shape: tuple[int, ...], dtype: str, message: str):
    given = arguments(**{name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(rope_and_write, *given.values())


def test_bad_sizes_are_named():
    f32 = jnp.float32
    no_query = arguments(qkv=jax.ShapeDtypeStruct((5, 2, 2, 64), f32), bias=None)
    with pytest.raises(ValueError, match="at least 3 rows, but J = 2"):
        jax.eval_shape(rope_and_write, *no_query.values())
    angles = {name: jax.ShapeDtypeStruct((5, 64), f32) for name in ("cos", "sin")}
    with pytest.raises(ValueError, match="H = 64 and I = 64"):
        jax.eval_shape(rope_and_write, *arguments(**angles).values())
    run = partial(rope_and_write, implementation="cuda")
    with pytest.raises(ValueError, match=r"one of reference.*, not 'cuda'"):
        jax.eval_shape(run, *arguments().values())
