"""The shapes at which add_rms is tested and timed, with expected results."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.poison import Poisoned, poisoned_rows


@dataclass(frozen=True)
class Case:
    """One shape of the operation."""

    name: str
    tokens: int
    model_dim: int
    dtype: str = "float32"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the operation."""
        return {"eps": 1e-5}

    @property
    def work(self) -> tuple[float, str]:
        """Bytes that one call must read and write, and their unit."""
        return 3.0 * self.tokens * self.model_dim * jnp.dtype(self.dtype).itemsize, "B"


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, as numpy arrays."""

    case: Case
    x: np.ndarray  # [T, D]
    y: np.ndarray  # [T, D]

    @property
    def operands(self) -> tuple[np.ndarray, ...]:
        """Positional arguments of the operation."""
        return self.x, self.y

    @cached_property
    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """The expected sum [T, D] in the case's type, and scale float32[T]."""
        total = (self.x.astype(np.float32) + self.y.astype(np.float32)).astype(self.x.dtype)
        squares = np.square(total.astype(np.float64)).mean(axis=1)
        return total, (1 / np.sqrt(squares + self.case.options["eps"])).astype(np.float32)


def make_inputs(case: Case, seed: int) -> Inputs:
    """Make random arguments; tokens differ in size by orders of magnitude."""
    rng = np.random.default_rng(seed)
    shape = case.tokens, case.model_dim
    sizes = np.exp(rng.uniform(-3, 3, (case.tokens, 1)))
    x, y = (
        (sizes * rng.standard_normal(shape)).astype(np.float32).astype(jnp.dtype(case.dtype))
        for _ in range(2)
    )
    return Inputs(case, x, y)


def poisoned(inputs: Inputs, value: float) -> Poisoned:
    """Poison some tokens of the inputs."""
    return poisoned_rows(inputs.operands, value, places=(0, 1))


CASES = (
    Case("one token", 1, 64),
    Case("odd", 5, 577),
    Case("smollm2", 3, 576),
    Case("bf16 128", 2, 128, dtype="bfloat16"),
    Case("bf16 640", 5, 640, dtype="bfloat16"),
    Case("bf16 4096", 3, 4096, dtype="bfloat16"),
)
"""Cases small enough for an interpreter."""

LARGE_CASES = (
    Case("llama 8b 1", 1, 4096, dtype="bfloat16"),
    Case("llama 8b 64", 64, 4096, dtype="bfloat16"),
    Case("llama 8b 8k", 8192, 4096, dtype="bfloat16"),
)
"""Cases of Llama 3 8B, for accelerators."""
