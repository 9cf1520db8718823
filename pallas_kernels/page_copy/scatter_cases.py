"""The shapes at which scatter is tested and timed: gather's cases for all heads."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pallas_kernels.naive import normal
from pallas_kernels.page_copy import cases
from pallas_kernels.page_copy.cases import LARGE_CASES, Case
from pallas_kernels.poison import Poisoned, some

__all__ = ["CASES", "LARGE_CASES", "Case", "Inputs", "make_inputs"]

CASES = tuple(case for case in cases.CASES if case.heads is None)


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of scatter, as numpy arrays."""

    arrays: tuple[np.ndarray, ...]  # A of [K, P, S, H]
    pages: np.ndarray  # [A * K, Z, S, H]
    page_ids: np.ndarray  # i32[Z]

    @property
    def operands(self) -> tuple[Any, ...]:
        """Positional arguments of the operation."""
        return self.arrays, self.pages, self.page_ids

    @cached_property
    def expected(self) -> tuple[np.ndarray, ...]:
        """The expected pools, A of [K, P, S, H]; the null page is meaningless."""
        arrays = tuple(array.copy() for array in self.arrays)
        for array, new in zip(arrays, np.split(self.pages, len(arrays)), strict=True):
            array[:, self.page_ids] = new
        return arrays


def make_inputs(case: Case, seed: int) -> Inputs:
    """Make random numbers for pages all over the pools. The other pages must survive. Numbers that
    go to the null page, in any order, are NaN."""
    inputs = cases.make_inputs(case, seed)
    rng = np.random.default_rng([seed, 1])
    shape = case.arrays * case.kv_heads, case.ids, case.page_size, case.head_dim
    pages = normal(rng, shape, lambda x: x.astype(inputs.arrays[0].dtype))
    pages[:, inputs.page_ids == 0] = np.nan
    return Inputs(inputs.arrays, pages, inputs.page_ids)


def poisoned(inputs: Inputs, value: float) -> Poisoned:
    """Poison some of the new pages."""
    which = some(len(inputs.page_ids)) & (inputs.page_ids != 0)
    pages, ids = inputs.pages.copy(), inputs.page_ids[which]
    pages[:, which] = value
    return Poisoned(
        (inputs.arrays, pages, inputs.page_ids),
        # The contents of the null page are unspecified.
        spared=lambda pools: [np.delete(pool, [0, *ids], axis=1) for pool in pools],
        spoiled=lambda pools: [pool[:, ids].swapaxes(0, 1) for pool in pools],
    )
