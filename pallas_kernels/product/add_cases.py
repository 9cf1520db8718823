"""The shapes at which add_product is tested and timed, with expected results."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pallas_kernels.poison import Poisoned, poisoned_rows
from pallas_kernels.product import cases
from pallas_kernels.product.cases import Case


@dataclass(frozen=True)
class AddCase(Case):
    """One shape of the operation."""

    eps: float = 1e-5

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the operation."""
        return {"eps": self.eps}


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, as numpy arrays."""

    case: AddCase
    x: np.ndarray  # [T, B]
    product: cases.Inputs

    @property
    def operands(self) -> tuple[np.ndarray, ...]:
        """Positional arguments of the operation."""
        return self.x, *self.product.operands

    @cached_property
    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """The expected sum float32[T, B] and scale float32[T]."""
        total = self.x.astype(np.float32) + self.product.expected
        return total, 1 / np.sqrt(np.mean(np.square(total), axis=1) + self.case.eps)


def make_inputs(case: AddCase, seed: int) -> Inputs:
    """Make random arguments; x has numbers of the product's size."""
    shape = (case.tokens, case.columns)
    x = np.random.default_rng((seed, 1)).standard_normal(shape, np.float32)
    product = cases.make_inputs(case, seed)
    return Inputs(case, x.astype(product.x.dtype), product)


def poisoned(inputs: Inputs, value: float) -> Poisoned:
    """Poison some tokens of the inputs."""
    return poisoned_rows(inputs.operands, value, places=(0, 1))


def _of(case: Case) -> AddCase:
    return AddCase(**vars(case))


CASES = (*map(_of, cases.CASES), replace(_of(cases.CASES[2]), name="large eps", eps=0.5))
"""Cases small enough for an interpreter."""

LARGE_CASES = tuple(_of(case) for case in cases.LARGE_CASES if case.columns == 4096)
"""Cases of Llama 3 8B, for accelerators."""
