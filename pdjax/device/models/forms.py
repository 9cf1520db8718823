"""Forms in which tensors of a checkpoint, [out, in], become a weight. A form makes a slice of the
weight out of slices of the tensors, so that loading reads no more than a shard needs. The rows of a
tensor [expert, out, in] are those of its matrices, one after another.

Dimension key: D model dim, K KV heads, H head dim, F MLP dim, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

Bounds = tuple[tuple[int, int], ...]
"""First and last + 1 of a slice, for each axis."""

Fetch = Callable[[int, slice, slice], np.ndarray]
"""(which tensor, rows, cols) -> that slice of it."""

Rows = Sequence[int]
"""How many rows each tensor has."""


@dataclass(frozen=True)
class Form:
    """A way to make a weight.

    Attributes:
      read: (fetch, rows of each tensor, units, bounds) -> the slice `bounds` of the weight.
      axis: of the weight, which the rows of the tensors become. They are contiguous in a file, so
        that a weight is filled along it.
      unit: letter of a dimension that is not cut along that axis, such as "K"; None: all are.
      inner: axis of the rows within one unit, along which a unit that is too large is filled; None:
        units are read whole.
    """

    read: Callable[[Fetch, Rows, int, Bounds], np.ndarray]
    axis: int
    unit: str | None = None
    inner: int | None = None


def rotary_order(head_dim: int, rotary_dim: int | None, neighbours: bool) -> tuple[int, ...]:
    """The rows of a head in the order in which RoPE pairs row i with row i + H/2.

    The rows that are rotated are the first `rotary_dim` of a checkpoint's, all if it is None.
    Scores do not change when the rows of Q and K of a head change places together, so that kernels
    need to know one order alone.

    Args:
      head_dim: H.
      rotary_dim: rows that are rotated, as the first ones of each half.
      neighbours: whether the two rows of a pair lie side by side in the checkpoint, instead of half
        of `rotary_dim` apart.

    Returns:
      which row of the checkpoint each row is; empty if they keep their order.
    """
    rotated = head_dim if rotary_dim is None else rotary_dim
    if rotated == head_dim and not neighbours:
        return ()
    step, apart = (2, 1) if neighbours else (1, rotated // 2)
    first = [step * pair for pair in range(rotated // 2)]
    still, half = list(range(rotated, head_dim)), (head_dim - rotated) // 2
    return (*first, *still[:half], *(row + apart for row in first), *still[half:])


def _plain(fetch: Fetch, rows: Rows, units: int, bounds: Bounds) -> np.ndarray:
    return fetch(0, slice(*bounds[0]), slice(*bounds[1]) if len(bounds) > 1 else slice(None))


def _transposed(fetch: Fetch, rows: Rows, units: int, bounds: Bounds) -> np.ndarray:
    return fetch(0, slice(*bounds[1]), slice(*bounds[0])).T


def _stacked(fetch: Fetch, rows: Rows, units: int, bounds: Bounds) -> np.ndarray:
    parts = [fetch(i, slice(*bounds[2]), slice(*bounds[0])).T for i in range(len(rows))]
    return np.stack(parts, axis=1)[:, slice(*bounds[1])]


def _grouped(fetch: Fetch, rows: Rows, units: int, bounds: Bounds) -> np.ndarray:
    """Put the rows of a unit together, those of all tensors, unit after unit."""
    *before, (start, stop) = bounds
    each = [count // units for count in rows]
    width = sum(each)
    assert start % width == 0 and stop % width == 0, "shards hold whole units"
    first, last = start // width, stop // width
    cols = slice(*before[0]) if before else slice(None)
    parts = []
    for i, count in enumerate(each):
        part = fetch(i, slice(first * count, last * count), cols)
        parts.append(part.reshape(last - first, count, *part.shape[1:]))
    whole = np.concatenate(parts, axis=1)
    return whole.reshape(-1, *whole.shape[2:]).T


def _experts(fetch: Fetch, rows: Rows, units: int, bounds: Bounds, *, parts: int) -> np.ndarray:
    """The matrices of experts, [in, out] each or, of several parts, [in, part, out]."""
    (first, last), (start, stop), *inner = bounds
    out = rows[0] // units // parts
    (one, end), (left, right) = inner if parts > 1 else ((0, 1), *inner)
    shape = last - first, end - one, right - left, stop - start
    found = None
    for expert, part in np.ndindex(shape[:2]):
        before = ((first + expert) * parts + one + part) * out
        matrix = fetch(0, slice(before + left, before + right), slice(start, stop))
        found = np.empty(shape, matrix.dtype) if found is None else found
        found[expert, part] = matrix
    assert found is not None, "a slice of no expert"
    whole = np.moveaxis(found, 3, 1)  # [expert, in, part, out]
    return whole if parts > 1 else whole[:, :, 0]


PLAIN = Form(_plain, axis=0)
"""A tensor as it is."""

TRANSPOSED = Form(_transposed, axis=1)
"""[out, in] -> [in, out]."""

STACKED = Form(_stacked, axis=2)
"""Tensors of one shape [out, in] -> [in, tensor, out]."""

BY_HEAD = Form(_grouped, axis=1, unit="K")
"""Tensors [K * rows, in] -> [in, columns], grouped by KV head, so that a contiguous run of columns
is a shard of tensor parallelism."""

VECTOR_BY_HEAD = Form(_grouped, axis=0, unit="K")
"""The same of vectors."""

EXPERTS = Form(partial(_experts, parts=1), axis=0, unit="E", inner=2)
"""A tensor [expert, out, in] -> [expert, in, out]."""

EXPERTS_STACKED = Form(partial(_experts, parts=2), axis=0, unit="E", inner=3)
"""A tensor [expert, 2 * out, in] of two matrices an expert -> [expert, in, 2, out]."""
