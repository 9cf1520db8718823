"""The shapes at which norm_product is tested and timed, with answers."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pallas_kernels.product import cases
from pallas_kernels.product.cases import Case


@dataclass(frozen=True)
class NormCase(Case):
    """One shape of the operation."""

    eps: float = 1e-5

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the operation."""
        return {"eps": self.eps}


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, as numpy arrays."""

    case: NormCase
    x: np.ndarray  # [T, A]
    w: np.ndarray  # [A, B]

    @cached_property
    def scale(self) -> np.ndarray:
        """float32[T]."""
        squares = np.square(self.x.astype(np.float32))
        return 1 / np.sqrt(np.mean(squares, axis=1) + np.float32(self.case.eps))

    @property
    def operands(self) -> tuple[np.ndarray, ...]:
        """Positional arguments of the operation."""
        return self.x, self.scale, self.w

    @cached_property
    def expected(self) -> np.ndarray:
        """float32[T, B], of the results' product."""
        normed = self.x.astype(np.float32) * self.scale[:, None]
        return normed @ self.w.astype(np.float32)


def make_inputs(case: NormCase, seed: int) -> Inputs:
    """Random arguments; tokens differ in size by orders of magnitude."""
    product = cases.make_inputs(case, seed)
    sizes = np.exp(np.random.default_rng((seed, 1)).uniform(-3, 3, (case.tokens, 1)))
    x = (product.x.astype(np.float32) * sizes.astype(np.float32)).astype(product.x.dtype)
    return Inputs(case, x, product.w)


def _of(case: Case) -> NormCase:
    return NormCase(**vars(case))


CASES = (*map(_of, cases.CASES), replace(_of(cases.CASES[2]), name="large eps", eps=0.5))
"""Small enough for an interpreter."""

LARGE_CASES = tuple(_of(case) for case in cases.LARGE_CASES if case.columns == 6144)
"""Of Llama 3 8B, for accelerators."""
