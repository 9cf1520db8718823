"""The shapes at which layer_products is tested and timed, with answers."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Case:
    """One shape of the operation."""

    name: str
    tokens: int
    heads_dim: int
    model_dim: int
    mlp_dim: int
    qkv_dim: int
    """0: there is no next layer."""
    dtype: str = "float32"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the operation."""
        return {"eps": 1e-5}

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the operands."""
        d, f = self.model_dim, self.mlp_dim
        rows = (self.tokens, self.heads_dim), (self.tokens, d)
        weights = (self.heads_dim, d), (d, 2, f), (f, d), (d, self.qkv_dim)
        return (*rows, *(weights if self.qkv_dim else weights[:-1]))

    @property
    def work(self) -> tuple[float, str]:
        """Bytes of what one call must read."""
        numbers = sum(math.prod(shape) for shape in self.shapes)
        return float(numbers * jnp.dtype(self.dtype).itemsize), "B"


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, as numpy arrays."""

    case: Case
    operands: tuple[np.ndarray, ...]
    """Positional arguments of the operation."""

    @cached_property
    def expected(self) -> tuple[np.ndarray, ...]:
        """float32 [T, D], [T] and, if there is a next layer, [T, C]."""
        exact = [x.astype(np.float32) for x in self.operands]
        o, x, wo, w_gate_up, w_down, *wqkv = exact
        x, scale = self._sum(x, o @ wo)
        gate, up = ((x @ w_gate_up[:, i]) * scale[:, None] for i in range(2))
        hidden = self._rounded(0.5 * gate * (1 + np.tanh(0.5 * gate)) * up)
        x, scale = self._sum(x, hidden @ w_down)
        return x, scale, *(x @ w for w in wqkv)

    def _sum(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total = self._rounded(x + self._rounded(y))
        squares = np.square(total.astype(np.float64)).mean(axis=1)
        return total, (1 / np.sqrt(squares + self.case.options["eps"])).astype(np.float32)

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        return x.astype(jnp.dtype(self.case.dtype)).astype(np.float32)


def make_inputs(case: Case, seed: int) -> Inputs:
    """Random arguments, of such a size that every product has variance 1."""
    rng = np.random.default_rng(seed)

    def random(index: int, shape: tuple[int, ...]) -> np.ndarray:
        size = 1.0 if index < 2 else shape[0] ** -0.5
        numbers = size * rng.standard_normal(shape, np.float32)
        return numbers.astype(np.float32).astype(jnp.dtype(case.dtype))

    return Inputs(case, tuple(random(i, shape) for i, shape in enumerate(case.shapes)))


CASES = (
    Case("one token", 1, 64, 64, 128, 96),
    Case("odd", 5, 77, 31, 45, 93),
    Case("last layer", 3, 64, 64, 128, 0),
    Case("bf16 one", 1, 256, 512, 384, 768, dtype="bfloat16"),
    Case("bf16 8", 8, 128, 256, 128, 512, dtype="bfloat16"),
    Case("bf16 last layer", 16, 256, 256, 256, 0, dtype="bfloat16"),
    Case("bf16 64", 64, 256, 256, 512, 384, dtype="bfloat16"),
    Case("bf16 72", 72, 128, 128, 128, 256, dtype="bfloat16"),
    Case("bf16 128", 128, 256, 256, 384, 256, dtype="bfloat16"),
)
"""Small enough for an interpreter."""

LARGE_CASES = tuple(
    Case(f"llama 8b {tokens}", tokens, 4096, 4096, 14336, 6144, dtype="bfloat16")
    for tokens in (1, 16, 64, 128)
)
"""Of Llama 3 8B, for accelerators."""
