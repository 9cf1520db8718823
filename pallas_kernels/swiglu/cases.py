"""The shapes at which swiglu is tested and timed, with expected results."""

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
    mlp_dim: int
    dtype: str = "float32"
    eps: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the operation."""
        return {"eps": self.eps}

    @property
    def work(self) -> tuple[float, str]:
        """Floating-point operations of the product, and their unit."""
        return 4.0 * self.tokens * self.model_dim * self.mlp_dim, "FLOP"


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, as numpy arrays."""

    case: Case
    x: np.ndarray  # [T, D]
    scale: np.ndarray  # f32[T]
    w_gate_up: np.ndarray  # [D, 2, F]

    @property
    def operands(self) -> tuple[np.ndarray, ...]:
        """Positional arguments of the operation."""
        return self.x, self.scale, self.w_gate_up

    @cached_property
    def expected(self) -> np.ndarray:
        """The expected result, float32[T, F]."""
        gate, up = (
            (self.x.astype(np.float32) @ self.w_gate_up[:, i].astype(np.float32))
            * self.scale[:, None]
            for i in range(2)
        )
        return 0.5 * gate * (1 + np.tanh(0.5 * gate)) * up


def make_inputs(case: Case, seed: int) -> Inputs:
    """Make random arguments. Tokens differ in size by orders of magnitude, and their scales make up
    for that. Every seventh token has gates so large that exp(-gate) may overflow. With eps the
    scales are RMSNorm's."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    sizes = np.exp(rng.uniform(-3, 3, case.tokens)).astype(np.float32)
    x = sizes[:, None] * rng.standard_normal((case.tokens, case.model_dim), np.float32)
    scale = rng.uniform(0.5, 2, case.tokens).astype(np.float32) / sizes
    scale[::7] *= 100
    if case.eps is not None:
        rounded = x.astype(dtype).astype(np.float32)
        scale = 1 / np.sqrt(np.mean(np.square(rounded), axis=1) + np.float32(case.eps))
    shape = (case.model_dim, 2, case.mlp_dim)
    w = rng.standard_normal(shape, np.float32) * case.model_dim**-0.5
    return Inputs(case, x.astype(dtype), scale, w.astype(dtype))


def poisoned(inputs: Inputs, value: float) -> Poisoned:
    """Poison some tokens of the inputs."""
    return poisoned_rows(inputs.operands, value)


CASES = (
    Case("one token", 1, 64, 128),
    Case("odd", 5, 77, 31),
    Case("smollm2", 3, 576, 1536),
    Case("bf16 few", 3, 128, 256, dtype="bfloat16"),
    Case("bf16 8", 8, 128, 192, dtype="bfloat16"),
    Case("bf16 64", 64, 64, 128, dtype="bfloat16"),
    Case("bf16 72", 72, 320, 384, dtype="bfloat16"),
    Case("bf16 normed 8", 8, 128, 192, "bfloat16", 1e-3),
    Case("bf16 normed 72", 72, 320, 384, "bfloat16", 1e-5),
    Case("bf16 normed 128", 128, 128, 256, "bfloat16", 1e-5),
    Case("bf16 256", 256, 320, 384, dtype="bfloat16"),
    Case("bf16 ragged", 320, 192, 256, dtype="bfloat16"),
)
"""Cases small enough for an interpreter."""

LARGE_CASES = (
    Case("llama 8b 64", 64, 4096, 14336, dtype="bfloat16"),
    Case("llama 8b 128", 128, 4096, 14336, dtype="bfloat16"),
    Case("llama 8b normed 16", 16, 4096, 14336, "bfloat16", 1e-5),
    Case("llama 8b normed 64", 64, 4096, 14336, "bfloat16", 1e-5),
    Case("llama 8b normed 128", 128, 4096, 14336, "bfloat16", 1e-5),
    Case("llama 8b 1k", 1024, 4096, 14336, dtype="bfloat16"),
    Case("llama 8b 1984", 1984, 4096, 14336, dtype="bfloat16"),
    Case("llama 8b 8k", 8192, 4096, 14336, dtype="bfloat16"),
    Case("llama 1b 2k", 2048, 2048, 8192, dtype="bfloat16"),
)
"""Cases of Llama 3, for accelerators."""
