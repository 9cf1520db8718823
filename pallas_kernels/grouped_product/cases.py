"""The shapes at which grouped_product is tested and timed, with expected results."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.poison import Poisoned, some


@dataclass(frozen=True)
class Case:
    """One shape of the operation.

    Attributes:
      rows: M. sizes: rows of each group; those behind all groups are padding.
      depth: A. columns: B.
    """

    name: str
    rows: int
    sizes: tuple[int, ...]
    depth: int
    columns: int
    dtype: str = "float32"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the operation."""
        return {}

    @property
    def work(self) -> tuple[float, str]:
        """Floating-point operations, and their unit."""
        return 2.0 * sum(self.sizes) * self.depth * self.columns, "FLOP"


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, as numpy arrays."""

    case: Case
    x: np.ndarray  # [M, A]
    w: np.ndarray  # [E, A, B]

    @property
    def operands(self) -> tuple[np.ndarray, ...]:
        """Positional arguments of the operation."""
        return self.x, self.w, np.array(self.case.sizes, np.int32)

    @property
    def count(self) -> int:
        """Rows of all groups: those whose results are specified."""
        return sum(self.case.sizes)

    @cached_property
    def expected(self) -> np.ndarray:
        """The expected products, float32[count, B]."""
        groups = np.split(self.x[: self.count], np.cumsum(self.case.sizes)[:-1])
        pairs = zip(groups, self.w, strict=True)
        return np.concatenate([x.astype(np.float32) @ w.astype(np.float32) for x, w in pairs])


def make_inputs(case: Case, seed: int) -> Inputs:
    """Make random arguments; results have variance 1. The rows behind all groups are NaN."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    x = rng.standard_normal((case.rows, case.depth), np.float32)
    x[sum(case.sizes) :] = np.nan
    shape = (len(case.sizes), case.depth, case.columns)
    w = rng.standard_normal(shape, np.float32) * case.depth**-0.5
    return Inputs(case, x.astype(dtype), w.astype(dtype))


def poisoned(inputs: Inputs, value: float) -> Poisoned:
    """Poison some rows of the inputs."""
    x, *rest = inputs.operands
    changed, which = x.copy(), np.flatnonzero(some(inputs.count))
    for i, row in enumerate(which):
        changed[row, (7 * i) % x.shape[1]] = value
    left = np.delete(np.arange(inputs.count), which)
    return Poisoned(
        (changed, *rest), spared=lambda out: out[left], spoiled=lambda out: [out[which]]
    )


CASES = (
    Case("one row", 1, (0, 1), 33, 31),
    Case("all in one", 300, (0, 300, 0), 32, 48),
    Case("padded", 24, (0, 5, 0, 0, 9, 1), 48, 64),
    Case("bf16", 200, (130, 0, 1, 60), 64, 128, "bfloat16"),
)
"""Cases small enough for an interpreter."""


def _even(rows: int, groups: int) -> tuple[int, ...]:
    return tuple(len(part) for part in np.array_split(np.arange(rows), groups))


LARGE_CASES = tuple(
    Case(f"{model} {name} {rows}", rows, _even(rows, groups), depth, columns, "bfloat16")
    for model, groups, width, mlp in (("qwen3 30b", 128, 2048, 768), ("mixtral", 8, 4096, 14336))
    for rows in (128, 512, 16384)
    for name, depth, columns in (("gate up", width, 2 * mlp), ("down", mlp, width))
)
"""Cases of Qwen3-30B-A3B and of Mixtral 8x7B, for accelerators."""
