"""Rows are islands: a row's numbers change no bit of another row, in every implementation of every
operation, and without poison the numbers are right. Pages store a token that is not finite as
`pallas_kernels.finite` says."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels.add_rms.mosaic_gpu as add_gpu
import pallas_kernels.kv_write.mosaic_gpu as write_gpu
import pallas_kernels.kv_write.mosaic_tpu as write_tpu
import pallas_kernels.page_copy.mosaic_gpu as copy_gpu
import pallas_kernels.paged_attention.mosaic_gpu as paged_gpu
import pallas_kernels.paged_attention.mosaic_tpu as paged_tpu
import pallas_kernels.prefill_attention.mosaic_gpu as prefill_gpu
import pallas_kernels.prefill_attention.mosaic_tpu as prefill_tpu
import pallas_kernels.product.mosaic_gpu as product_gpu
import pallas_kernels.swiglu.mosaic_gpu as swiglu_gpu
from pallas_kernels import check
from pallas_kernels.finite import finite_below, guarded
from pallas_kernels.kv_write import cases as write_cases
from pallas_kernels.page_copy import cases as copy_cases
from pallas_kernels.paged_attention import cases as paged_cases
from pallas_kernels.poison import VALUES
from pallas_kernels.prefill_attention import cases as prefill_cases

# Products with numbers that are not finite, and with unwritten memory, warn.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU is interpreted from JAX 0.11 on"
)

NAN = {"NaN": np.nan}
"""Poison for interpreted kernels; `check` tries the other values on hardware."""

LENS = (5, 33, 0, 65, 40)
ROWS = paged_cases.Case("rows", LENS, kv_heads=1, group=2)
ROWS_BF16 = paged_cases.Case("bf16 rows", LENS, 1, 2, dtype="bfloat16")
ROWS_INT8 = paged_cases.Case("int8 rows", LENS, 1, 2, 64, 32, "bfloat16", "int8")
TOKENS = write_cases.Case("tokens", ((3, 9), (0, 7)), 2, kv_heads=1, group=2)
TOKENS_BF16 = write_cases.Case("tokens", ((3, 9), (0, 7)), 2, 1, 2, dtype="bfloat16")
CHUNKS = ((40, 70), (9, 20), (30, 30), (0, 5), (1, 3))
PROMPTS = prefill_cases.Case("prompts", CHUNKS, 2, kv_heads=1, group=2)
WINDOW = prefill_cases.Case("window", CHUNKS, 2, kv_heads=1, group=1, sliding_window=12)
PROMPTS_BF16 = prefill_cases.Case("bf16", CHUNKS[:3], 0, kv_heads=1, group=1, dtype="bfloat16")
PAGES_BF16 = copy_cases.Case("pages", 1, 3, kv_heads=1, dtype="bfloat16")


def case_of(subject: check.Subject, name: str) -> Any:
    return next(case for case in subject.cases.CASES if case.name == name)


EDGES = (17, 1, 0, 65, 64)
"""Lengths of rows around pages and blocks; those that are poisoned have one token and a whole
block."""
EDGES_BF16 = replace(ROWS_BF16, kv_lens=EDGES, group=3)
EDGES_INT8 = replace(ROWS_INT8, kv_lens=EDGES, group=3)


def islands(
    subject: check.Subject,
    case: Any,
    run: Callable[..., Any],
    values: Mapping[str, float] = VALUES,
) -> None:
    inputs = subject.cases.make_inputs(case, 7)
    compiled = jax.jit(partial(run, **case.options))
    out = jax.tree.map(np.asarray, compiled(*inputs.operands))
    assert subject.error(inputs, out) <= subject.limits[case.dtype]
    assert check.Check(subject, "any", case).faults(inputs, compiled, out, values) == []


REFERENCE = [
    (check.ADD, case_of(check.ADD, "odd")),
    (check.PRODUCT, case_of(check.PRODUCT, "odd")),
    (check.ADD_PRODUCT, case_of(check.ADD_PRODUCT, "odd")),
    (check.SWIGLU, case_of(check.SWIGLU, "odd")),
    (check.PAGED, ROWS),
    (check.PAGED, ROWS_INT8),
    (check.APPEND, ROWS),
    (check.APPEND, ROWS_BF16),
    (check.APPEND, ROWS_INT8),
    (check.WRITE, TOKENS),
    (check.WRITE, TOKENS_BF16),
    (check.PREFILL, PROMPTS),
    (check.PREFILL, WINDOW),
    (check.GATHER, case_of(check.GATHER, "three pools")),
    (check.SCATTER, case_of(check.SCATTER, "three pools")),
]


def name_of(x: Any) -> str:
    return x.operation.__name__ if isinstance(x, check.Subject) else x.name.replace(" ", "_")


@pytest.mark.parametrize(("subject", "case"), REFERENCE, ids=name_of)
def test_reference(subject: check.Subject, case: Any):
    islands(subject, case, partial(subject.operation, implementation="reference"))


@pytest.mark.parametrize(
    ("subject", "case", "kernel"),
    [
        (check.PAGED, ROWS, paged_tpu.paged_attention),
        (check.WRITE, TOKENS, write_tpu.rope_and_write),
        (check.PREFILL, PROMPTS, prefill_tpu.prefill_attention),
    ],
    ids=lambda x: "" if callable(x) else name_of(x),
)
def test_tpu_kernel(subject: check.Subject, case: Any, kernel: Callable[..., Any]):
    islands(subject, case, partial(kernel, interpret=pltpu.InterpretParams()), NAN)


def all_heads(*operands: Any, interpret: Any) -> jax.Array:
    return copy_gpu.gather(*operands, heads=slice(0, 1), interpret=interpret)


@needs_gpu_interpreter
@pytest.mark.parametrize(
    ("subject", "case", "kernel"),
    [
        (check.ADD, case_of(check.ADD, "bf16 640"), add_gpu.add_rms),
        (check.PRODUCT, case_of(check.PRODUCT, "bf16 8"), product_gpu.product),
        (check.SWIGLU, case_of(check.SWIGLU, "bf16 8"), swiglu_gpu.swiglu),
        (check.APPEND, EDGES_BF16, partial(paged_gpu.append_attention, parts=2, programs=3)),
        (check.APPEND, EDGES_INT8, partial(paged_gpu.append_attention, parts=2, programs=3)),
        (check.WRITE, TOKENS_BF16, write_gpu.rope_and_write),
        (check.PREFILL, PROMPTS_BF16, partial(prefill_gpu.prefill_attention, programs=1)),
        (check.GATHER, PAGES_BF16, all_heads),
    ],
    ids=lambda x: "" if callable(x) else name_of(x),
)
def test_gpu_kernel(subject: check.Subject, case: Any, kernel: Callable[..., Any]):
    islands(subject, case, partial(kernel, interpret=plgpu.InterpretGPUParams()), NAN)


@pytest.mark.parametrize(
    ("case", "kernel"),
    [(PROMPTS, "reference"), (WINDOW, "reference"), (WINDOW, "mosaic_tpu")],
    ids=lambda x: x if isinstance(x, str) else name_of(x),
)
def test_older_tokens_of_a_prompt_feel_no_poison_in_v(case: prefill_cases.Case, kernel: str):
    """Pages never hold poison in V, but these two implementations would tolerate it."""
    run: Callable[..., Any] = partial(check.PREFILL.operation, implementation="reference")
    if kernel == "mosaic_tpu":
        run = partial(prefill_tpu.prefill_attention, interpret=pltpu.InterpretParams())
    inputs = prefill_cases.make_inputs(case, 7)
    compiled = jax.jit(partial(run, **case.options))
    right = np.asarray(compiled(*inputs.operands))
    for value in VALUES.values():
        poisoned = prefill_cases.poisoned(inputs, value, raw=True)
        out = np.asarray(compiled(*poisoned.operands))
        np.testing.assert_array_equal(poisoned.spared(out), poisoned.spared(right))
        if not np.isfinite(value):
            assert not np.isfinite(poisoned.spoiled(out)[0]).all(axis=(1, 2)).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float32"])
def test_what_is_finite_is_known_before_it_is_rounded(dtype: str):
    largest, below = float(jnp.finfo(dtype).max), finite_below(dtype)
    edges = np.array([below, largest, 1.0, 0.0, np.inf, np.nan, -largest, -np.inf], np.float32)
    edges = np.concatenate([edges, np.nextafter(edges[:1], np.float32(0))])
    if below < np.inf:
        edges = edges[1:]
    is_finite = np.isfinite(edges.astype(jnp.dtype(dtype)).astype(np.float32))
    np.testing.assert_array_equal(np.abs(edges) < below, is_finite)


def test_pages_hold_nan_in_k_for_what_is_not_finite():
    bad = [np.nan, np.inf, -np.inf, 3.4e38]  # the last is infinite in bfloat16
    k = jnp.array([1.0, *bad, *[2.0] * 4])
    v = jnp.array([1.0, *[3.0] * 4, *bad])
    held_k, held_v = guarded(k, v, finite_below("bfloat16"))
    assert held_k[0] == 1 and bool(jnp.isnan(held_k[1:]).all())
    assert held_v.tolist() == [1.0, *[3.0] * 4, *[0.0] * 4]


def mixing(x: jax.Array, w: jax.Array) -> jax.Array:
    """A product with rows that spread NaN to one another."""
    return x @ w + 0 * x.sum()


def hiding(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.nan_to_num(x) @ w


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [(mixing, "NEIGHBOURS CHANGE BESIDE NaN"), (hiding, "POISON IS LOST BESIDE")],
)
def test_the_check_finds_what_is_no_island(wrong: Callable[..., Any], fault: str):
    case = case_of(check.PRODUCT, "odd")
    inputs = check.PRODUCT.cases.make_inputs(case, 0)
    faults = check.Check(check.PRODUCT, "any", case).faults(
        inputs, wrong, np.asarray(wrong(*inputs.operands))
    )
    assert any(each.startswith(fault) for each in faults)
