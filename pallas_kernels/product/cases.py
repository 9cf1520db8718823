"""The shapes at which product is tested and timed, with expected results."""

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
    depth: int
    columns: int
    dtype: str = "float32"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the operation."""
        return {}

    @property
    def work(self) -> tuple[float, str]:
        """Bytes that one call must read and write, and their unit."""
        numbers = self.depth * self.columns + self.tokens * (self.depth + self.columns)
        return float(numbers * jnp.dtype(self.dtype).itemsize), "B"


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, as numpy arrays."""

    case: Case
    x: np.ndarray  # [T, A]
    w: np.ndarray  # [A, B]

    @property
    def operands(self) -> tuple[np.ndarray, ...]:
        """Positional arguments of the operation."""
        return self.x, self.w

    @cached_property
    def expected(self) -> np.ndarray:
        """The expected product, float32[T, B]."""
        return self.x.astype(np.float32) @ self.w.astype(np.float32)


def make_inputs(case: Case, seed: int) -> Inputs:
    """Make random arguments; results have variance 1."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    x = rng.standard_normal((case.tokens, case.depth), np.float32)
    w = rng.standard_normal((case.depth, case.columns), np.float32) * case.depth**-0.5
    return Inputs(case, x.astype(dtype), w.astype(dtype))


def poisoned(inputs: Inputs, value: float) -> Poisoned:
    """Poison some tokens of the inputs."""
    return poisoned_rows(inputs.operands, value)


CASES = (
    Case("one token", 1, 64, 128),
    Case("odd", 5, 77, 31),
    Case("smollm2", 3, 576, 960),
    Case("bf16 one", 1, 128, 128, dtype="bfloat16"),
    Case("bf16 8", 8, 128, 192, dtype="bfloat16"),
    Case("bf16 64", 64, 192, 128, dtype="bfloat16"),
    Case("bf16 72", 72, 256, 256, dtype="bfloat16"),
    Case("bf16 128", 128, 256, 384, dtype="bfloat16"),
)
"""Cases small enough for an interpreter."""

LARGE_CASES = tuple(
    Case(f"llama 8b {name} {tokens}", tokens, depth, columns, dtype="bfloat16")
    for tokens in (16, 64, 128)
    for name, depth, columns in (
        ("qkv", 4096, 6144),
        ("wo", 4096, 4096),
        ("down", 14336, 4096),
    )
)
"""Cases of Llama 3 8B, for accelerators."""
