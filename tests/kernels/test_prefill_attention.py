"""prefill_attention: the reference and the TPU kernel against plain numpy, and the promises of the
interface."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels.errors import LIMITS, relative_error
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.prefill_attention import api, mosaic_tpu
from pallas_kernels.prefill_attention.api import prefill_attention
from pallas_kernels.prefill_attention.cases import CASES, LARGE_CASES, Case, Inputs, make_inputs
from tests.helpers.kernel_cases import without

SMALL = Case("small", ((5, 20), (1, 1)), padding=2)
REPEATED = ("one prompt", "chunks", "many short", "soft cap", "window", "bf16 soft cap")
"""Cases whose edges others have, which are neither interpreted nor lowered."""
LESS = (
    *("one token", "padded", "page 128", "head dim 128", "window of 1", "bf16"),
    *("bf16 head dim 128", "bf16 window"),
)
"""Cases that are lowered for TPUs, but not interpreted: others have several of their edges at
once."""
TPUS = {
    "v5e": AbstractDevice("TPU v5 lite", 1, platform="tpu"),
    "v6e": AbstractDevice("TPU v6 lite", 1, platform="tpu"),
}


def name_of(case: Case) -> str:
    return case.name.replace(" ", "_")


def run(inputs: Inputs, operation: Callable[..., jax.Array] = prefill_attention) -> np.ndarray:
    call = jax.jit(partial(operation, **inputs.case.options))
    return np.asarray(call(*inputs.operands))


def check(case: Case, operation: Callable[..., jax.Array]) -> None:
    inputs = make_inputs(case, seed=1)
    actual = run(inputs, operation)
    assert actual.dtype == inputs.q.dtype
    assert relative_error(actual, inputs.expected) <= LIMITS[case.dtype]


def taken_by(kernel: Any, *cases: Case) -> list[Case]:
    """List the cases that a kernel does not refuse."""
    taken = []
    for case in cases:
        inputs = make_inputs(replace(case, chunks=((1, 1),)), seed=0)
        if kernel.refusal(inputs.q, inputs.k_pages, inputs.kv_pages) is None:
            taken.append(case)
    return taken


def interpreted_tpu(**options: Any) -> Callable[..., jax.Array]:
    return partial(mosaic_tpu.prefill_attention, interpret=pltpu.InterpretParams(**options))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference(case: Case):
    check(case, prefill_attention)


@pytest.mark.smoke
def test_reference_on_a_small_case():
    check(SMALL, prefill_attention)


@pytest.mark.parametrize(
    "case",
    taken_by(
        mosaic_tpu,
        *without(CASES, *REPEATED, *LESS),
    ),
    ids=name_of,
)
def test_tpu_kernel(case: Case):
    """Of at most two query heads a KV head, but for one case. Chunks are in `test_poison`, too."""
    small = case if case.name == "smollm2" else replace(case, group=min(case.group, 2))
    if case.name == "bf16 many short":
        small = replace(small, chunks=case.chunks[::3])
    check(small, interpreted_tpu())


@pytest.mark.smoke
def test_tpu_kernel_on_a_small_case():
    check(SMALL, interpreted_tpu())


def test_tpu_kernel_reuses_its_buffer_without_races(monkeypatch: pytest.MonkeyPatch):
    """Sequences share tiles of 16 tokens, and each of their parts has up to 5 blocks of 32."""
    monkeypatch.setattr(mosaic_tpu, "_MAX_TOKENS", 16)
    monkeypatch.setattr(mosaic_tpu, "_MAX_BLOCK_TOKENS", 32)
    chunks = ((20, 150), (0, 40), (3, 3), (9, 80), (20, 20))
    case = Case("5 blocks", chunks, 3, kv_heads=1, group=1, sliding_window=140)
    check(case, interpreted_tpu(detect_races=True))


@pytest.mark.parametrize(
    ("hardware", "case"),
    [
        pytest.param(hardware, case, id=f"{hardware}-{name_of(case)}")
        for first, hardware in enumerate(("v6e", "v5e"))  # they hardly differ: a case has one
        for case in taken_by(mosaic_tpu, *without(CASES, *REPEATED), LARGE_CASES[-1])[first::2]
    ],
)
def test_tpu_kernel_lowers(hardware: str, case: Case):
    operation = partial(prefill_attention, implementation="mosaic_tpu", **case.options)
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=TPUS[hardware])
    with use_abstract_mesh(mesh):
        traced = jax.jit(operation).trace(*make_inputs(case, seed=0).operands)
        assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (replace(SMALL, head_dim=32), "head dim must be a multiple of 64, not 32"),
        (replace(SMALL, dtype="bfloat16", page_size=8), "multiple of 16, not 8"),
        (replace(SMALL, dtype="float16"), "not float16"),
        (replace(SMALL, kv_heads=64, group=1, page_size=128), "four pages of"),
        (replace(SMALL, kv_heads=1, group=160), "16 tokens of 160 heads exceed"),
        (replace(SMALL, padding=150_000, kv_heads=1, group=1), "of cuts and page ids exceed"),
    ],
)
def test_the_tpu_kernel_refuses_with_the_reason(case: Case, reason: str):
    operands = make_inputs(case, seed=0).operands
    operation = partial(prefill_attention, scale=1.0, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match=f"prefill_attention by mosaic_tpu: .*{reason}"):
        jax.eval_shape(operation, *operands)


def test_the_platform_chooses_among_the_proven(monkeypatch: pytest.MonkeyPatch):
    """A kernel runs where it is proven and takes the arguments; elsewhere the reference runs."""
    monkeypatch.setitem(api._PROVEN, "tpu", "mosaic_tpu")

    def kernels_on(platform: str, case: Case) -> int:
        operation = jax.jit(partial(prefill_attention, **case.options))
        mesh = AbstractMesh((1,), ("x",), abstract_device=TPUS["v5e"])
        with use_abstract_mesh(mesh):
            traced = operation.trace(*make_inputs(case, seed=0).operands)
            return traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")

    assert kernels_on("tpu", SMALL) == 1
    assert kernels_on("cpu", SMALL) == 0
    assert kernels_on("tpu", replace(SMALL, head_dim=32)) == 0
    check(SMALL, prefill_attention)


@pytest.mark.parametrize(
    ("operation", "window"),
    [(prefill_attention, None), (prefill_attention, 60), (interpreted_tpu(), 60)],
    ids=["reference", "reference-window", "mosaic_tpu-window"],
)
def test_chunks_and_neighbours_change_nothing(
    operation: Callable[..., jax.Array], window: int | None
):
    """A prompt has the same bits whole, behind another prompt, and in two chunks."""
    case = Case("two", ((37, 37), (120, 120)), kv_heads=1, group=2, sliding_window=window)
    both = make_inputs(case, seed=3)
    together = run(both, operation)[37:]

    def alone(first: int, last: int) -> np.ndarray:
        pages = both.kv_pages[both.cu_pages[1] :]
        return np.asarray(
            jax.jit(partial(operation, **case.options))(
                both.q[37 + first : 37 + last],
                both.k_pages,
                both.v_pages,
                pages,
                np.array([0, len(pages)], np.int32),
                np.array([0, last - first], np.int32),
                np.array([last], np.int32),
            )
        )

    # An interpreted kernel uses the CPU's products; some group their sums by the number of rows.
    exact = operation is prefill_attention
    same = partial(np.testing.assert_allclose, rtol=0, atol=0 if exact else 1e-6)
    same(alone(0, 120), together)
    same(alone(0, 70), together[:70])
    same(alone(70, 120), together[70:])


def test_one_token_chunks_are_decode():
    inputs = make_inputs(Case("decode", ((1, 40), (1, 1), (1, 99)), kv_heads=3, group=3), seed=4)
    table = np.zeros((3, 7), np.int32)
    for row in range(3):
        pages = inputs.kv_pages[inputs.cu_pages[row] : inputs.cu_pages[row + 1]]
        table[row, : len(pages)] = pages
    decoded = jax.jit(partial(paged_attention, **inputs.case.options))(
        inputs.q, inputs.k_pages, inputs.v_pages, table, inputs.kv_lens
    )
    np.testing.assert_allclose(np.asarray(decoded), run(inputs), rtol=1e-5, atol=1e-6)


def test_scores_take_bounded_memory():
    """Four times the tokens have sixteen times the scores, but do not take that much memory."""

    def temporary_bytes(tokens: int) -> int:
        inputs = make_inputs(Case("long", ((tokens, tokens),), kv_heads=1, group=1), seed=0)
        call = jax.jit(partial(prefill_attention, scale=1.0))
        memory = call.lower(*inputs.operands).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary_bytes(2048) < 2048 * 2048
    assert temporary_bytes(2048) < 5 * temporary_bytes(512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((4, 8, 32))}, "H = 64, but q has H = 32"),
        ({"kv_pages": jnp.zeros((2, 2), jnp.int32)}, r"kv_pages must be \[Z\].*\(2, 2\)"),
        ({"kv_pages": jnp.zeros((3,))}, "kv_pages must be int32, but it is float32"),
        ({"cu_pages": jnp.zeros((2,), jnp.int32)}, r"cu_pages must be \[B \+ 1\] = \[3\].*\(2,\)"),
        ({"cu_q_lens": jnp.zeros((4,), jnp.int32)}, r"cu_q_lens must be .*\[3\].*\(4,\)"),
        ({"kv_lens": jnp.zeros((3,), jnp.int32)}, r"cu_pages must be .*\[4\].*\(3,\)"),
        ({"scale": float("inf")}, "scale .*inf"),
        ({"implementation": "flash"}, "one of reference, mosaic_tpu, mosaic_gpu, not 'flash'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str):
    good = {
        "q": jnp.zeros((4, 8, 64)),
        "k_pages": jnp.zeros((4, 5, 16, 64)),
        "v_pages": jnp.zeros((4, 5, 16, 64)),
        "kv_pages": jnp.zeros((3,), jnp.int32),
        "cu_pages": jnp.zeros((3,), jnp.int32),
        "cu_q_lens": jnp.zeros((3,), jnp.int32),
        "kv_lens": jnp.zeros((2,), jnp.int32),
        "scale": 0.125,
    }
    with pytest.raises(ValueError, match=message):
        prefill_attention(**{**good, **changes})
