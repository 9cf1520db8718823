"""How far an implementation's results are from the expected ones, and how far they may be.

Errors are in units of the largest expected number.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from pallas_kernels.add_rms import cases as add_cases
from pallas_kernels.grouped_product import cases as grouped_cases
from pallas_kernels.kv_write import cases as write_cases
from pallas_kernels.page_copy import cases as gather_cases
from pallas_kernels.page_copy import scatter_cases
from pallas_kernels.paged_attention import append_cases
from pallas_kernels.paged_attention.cases import Pool, decoded
from pallas_kernels.product import add_cases as add_product_cases
from pallas_kernels.quantised import LIMITS as LARGEST
from pallas_kernels.swiglu import cases as swiglu_cases

LIMITS = {"float32": 2e-5, "bfloat16": 1e-2}
"""Largest error by the type of q, to which results, and in kernels the weights, are rounded."""

SWIGLU_LIMITS = LIMITS | {"bfloat16": 3.3 * 2**-8}
"""As `LIMITS`, where the reference rounds gate, up and the result, each by up to 2^-8 of itself in
bfloat16. The relative errors of up and of the result add up. silu multiplies that of a gate g > 0
by 1 + g / (1 + exp(g)), at most 1.28. Together, and to all orders, the error is 3.281 * 2^-8 of the
number, and at most that share of the token's largest; errors of float32 sums are far smaller. A
gate g < 0 contributes at most 0.27 of its up, which is less, unless g < -2.4 where up is 4.8 times
the token's largest number. No token of many random gates and ups is like that."""


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over largest expected number; infinite if any result is not finite."""
    if not np.isfinite(actual.astype(np.float32)).all():
        return float("inf")
    largest = max(float(np.abs(expected).max(initial=0)), 1e-30)
    return float(np.abs(actual.astype(np.float32) - expected).max(initial=0)) / largest


def attention_error(inputs: Any, out: np.ndarray) -> float:
    """Relative error of an attention over `Inputs` of its cases."""
    return relative_error(out, inputs.expected)


def write_error(
    inputs: write_cases.Inputs, outputs: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> float:
    """Largest error in q and in both pools; infinite if memory changed outside the writes."""
    real = inputs.real
    q, *pools = outputs
    before = inputs.k_pages, inputs.v_pages
    return max(relative_error(q[real], inputs.made[0][real]), *pool_errors(inputs, before, pools))


def pool_errors(
    inputs: write_cases.Inputs,
    before: Sequence[Pool],
    after: Sequence[Pool],
    error_of: Callable[..., float] = relative_error,
) -> list[float]:
    """Errors of K and of V where they were written; infinite if memory changed elsewhere."""
    errors = []
    for was, pool, new in zip(before, after, inputs.made[1:], strict=True):
        arrays = zip(jax.tree.leaves(was), jax.tree.leaves(pool), strict=True)
        lost = any((changed(*pair) & inputs.kept).any() for pair in arrays)
        error = error_of(decoded(pool, *inputs.written), new)
        errors.append(float("inf") if lost else error)
    return errors


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """bool[P, S]: where in [K, P, S, ...] a bit differs."""
    size = before.shape[:3]
    bits = (np.ascontiguousarray(x).view(np.uint8).reshape(*size, -1) for x in (before, after))
    return np.not_equal(*bits).any(axis=(0, 3))


def append_error(inputs: append_cases.Inputs, outputs: tuple[np.ndarray, Pool, Pool]) -> float:
    """Largest error in the attention and in both pools.

    In quantised pages it is the error of the attention over the written pages, and the part of the
    pools' error that rounding does not explain.
    """
    o, *pools = outputs
    dtype = inputs.paged.case.kv_dtype
    expected = inputs.expected if dtype is None else inputs.attention(*pools)
    error_of = relative_error if dtype is None else partial(rounding_error, dtype=dtype)
    errors = pool_errors(inputs.write, inputs.pools, pools, error_of)
    return max(relative_error(o, expected), *errors)


def rounding_error(actual: np.ndarray, exact: np.ndarray, *, dtype: str) -> float:
    """As `relative_error` of [..., H], beyond the error that `quantised.encode` to the type may
    make."""
    size = np.abs(exact)
    scale = size.max(axis=-1, keepdims=True, initial=0) / LARGEST[dtype]
    allowed = scale / 2 if dtype == "int8" else np.maximum(size / 16, scale / 1024)
    return relative_error(exact + np.maximum(np.abs(actual - exact) - allowed, 0), exact)


def add_error(inputs: add_cases.Inputs, outputs: tuple[np.ndarray, np.ndarray]) -> float:
    """Largest relative error of a token's scale; infinite if a sum differs in any bit."""
    (total, scale), (expected_total, expected_scale) = outputs, inputs.expected
    if not same_bits(total, expected_total):
        return float("inf")
    return float(np.abs(scale / expected_scale - 1).max())


def sum_error(inputs: add_product_cases.Inputs, outputs: tuple[np.ndarray, np.ndarray]) -> float:
    """Largest error of the sum and of a token's scale."""
    pairs = zip(outputs, inputs.expected, strict=True)
    return max(relative_error(*pair) for pair in pairs)


def swiglu_error(inputs: swiglu_cases.Inputs, out: np.ndarray) -> float:
    """Largest error of a token relative to its own largest number, since tokens differ in size."""
    return max(relative_error(*token) for token in zip(out, inputs.expected, strict=True))


def grouped_error(inputs: grouped_cases.Inputs, out: np.ndarray) -> float:
    """Relative error of the rows that are in a group."""
    return relative_error(out[: inputs.count], inputs.expected)


def gather_error(inputs: gather_cases.Inputs, out: np.ndarray) -> float:
    """0, or infinite if any bit differs."""
    return 0.0 if same_bits(out, inputs.expected) else float("inf")


def scatter_error(inputs: scatter_cases.Inputs, pools: tuple[np.ndarray, ...]) -> float:
    """As `gather_error`, for all pages but the null page."""
    pairs = zip(pools, inputs.expected, strict=True)
    same = all(same_bits(pool[:, 1:], want[:, 1:]) for pool, want in pairs)
    return 0.0 if same else float("inf")


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees of arrays have the same types and bits; NaN equals itself."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(_bits(x), _bits(y)) for x, y in pairs)


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)
