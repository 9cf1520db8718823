"""prefill_attention: the reference against plain numpy, and what the interface promises."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.check import LIMITS, relative_error
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.prefill_attention.api import prefill_attention
from pallas_kernels.prefill_attention.cases import CASES, Case, Inputs, make_inputs


def run(inputs: Inputs) -> np.ndarray:
    call = jax.jit(partial(prefill_attention, **inputs.case.options))
    return np.asarray(call(*inputs.operands))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_reference(case: Case):
    inputs = make_inputs(case, seed=1)
    actual = run(inputs)
    assert actual.dtype == inputs.q.dtype
    assert relative_error(actual, inputs.expected) <= LIMITS[case.dtype]


@pytest.mark.smoke
def test_reference_on_a_small_case():
    inputs = make_inputs(Case("small", ((5, 20), (1, 1)), padding=2), seed=1)
    assert relative_error(run(inputs), inputs.expected) <= LIMITS["float32"]


@pytest.mark.parametrize("window", [None, 100])
def test_chunks_and_neighbours_change_nothing(window: int | None):
    """A prompt has the same bits whole, behind another prompt, and in two chunks."""
    case = Case("two", ((37, 37), (200, 200)), kv_heads=3, group=3, sliding_window=window)
    both = make_inputs(case, seed=3)
    together = run(both)[37:]

    def alone(first: int, last: int) -> np.ndarray:
        pages = both.kv_pages[both.cu_pages[1] :]
        return np.asarray(
            jax.jit(partial(prefill_attention, **case.options))(
                both.q[37 + first : 37 + last],
                both.k_pages,
                both.v_pages,
                pages,
                np.array([0, len(pages)], np.int32),
                np.array([0, last - first], np.int32),
                np.array([last], np.int32),
            )
        )

    np.testing.assert_array_equal(alone(0, 200), together)
    np.testing.assert_array_equal(alone(0, 90), together[:90])
    np.testing.assert_array_equal(alone(90, 200), together[90:])


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
    """Four times the tokens: sixteen times the scores, but not of the memory."""

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
        ({"implementation": "flash"}, "one of reference, not 'flash'"),
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
