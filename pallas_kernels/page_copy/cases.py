"""The shapes at which gather and scatter are tested and timed; gather's inputs and expected
results."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.naive import normal
from pallas_kernels.poison import Poisoned, some


@dataclass(frozen=True)
class Case:
    """One shape of both operations."""

    name: str
    arrays: int
    ids: int
    null: int = 0
    """Number of ids that are the null page."""
    heads: tuple[int, int] | None = None
    """First head that gather takes, and the end of its heads; None takes all."""
    kv_heads: int = 2
    page_size: int = 16
    head_dim: int = 64
    dtype: str = "float32"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of gather."""
        return {} if self.heads is None else {"heads": slice(*self.heads)}

    @property
    def work(self) -> tuple[float, str]:
        """Bytes that one call must read and write, and their unit."""
        heads = self.kv_heads if self.heads is None else self.heads[1] - self.heads[0]
        page = heads * self.page_size * self.head_dim * jnp.dtype(self.dtype).itemsize
        return 2.0 * self.arrays * self.ids * page, "B"


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of gather, as numpy arrays."""

    case: Case
    arrays: tuple[np.ndarray, ...]  # A of [K, P, S, H]
    page_ids: np.ndarray  # i32[Z]

    @property
    def operands(self) -> tuple[Any, ...]:
        """Positional arguments of the operation."""
        return self.arrays, self.page_ids

    @cached_property
    def expected(self) -> np.ndarray:
        """The expected pages, [A * K', Z, S, H]."""
        heads = slice(*(self.case.heads or (0, self.case.kv_heads)))
        return np.concatenate([array[heads, self.page_ids] for array in self.arrays])


def make_inputs(case: Case, seed: int) -> Inputs:
    """Make random pools, and page ids all over them."""
    rng = np.random.default_rng(seed)
    pages = case.ids + 3
    real = 1 + rng.permutation(pages - 1)[: case.ids - case.null]
    ids = rng.permutation(np.concatenate([np.zeros(case.null, int), real]))
    shape = case.kv_heads, pages, case.page_size, case.head_dim
    dtype = jnp.dtype(case.dtype)
    arrays = tuple(normal(rng, shape, lambda x: x.astype(dtype)) for _ in range(case.arrays))
    return Inputs(case, arrays, ids.astype(np.int32))


def poisoned(inputs: Inputs, value: float) -> Poisoned:
    """Poison some pages of the inputs."""
    which = some(len(inputs.page_ids)) & (inputs.page_ids != 0)
    arrays = tuple(array.copy() for array in inputs.arrays)
    for array in arrays:
        array[:, inputs.page_ids[which]] = value
    return Poisoned(
        (arrays, inputs.page_ids),
        spared=lambda out: out[:, ~which],
        spoiled=lambda out: [out[:, which].swapaxes(0, 1)],
    )


CASES = (
    Case("one page", 1, 1, kv_heads=1),
    Case("three pools", 3, 5),
    Case("with null pages", 2, 7, null=3),
    Case("only null pages", 2, 2, null=2),
    Case("some heads", 2, 3, heads=(1, 3), kv_heads=4),
    Case("more pools than a kernel takes", 18, 2, kv_heads=1),
    Case("narrow", 2, 3, head_dim=6, page_size=3),
    Case("bf16", 4, 9, null=1, dtype="bfloat16"),
    Case("bf16 page 64", 2, 5, null=2, kv_heads=3, page_size=64, head_dim=128, dtype="bfloat16"),
    Case("page of 2 pieces", 2, 3, null=1, page_size=128, head_dim=128),
    Case("page of 384", 2, 2, page_size=384, head_dim=32, dtype="bfloat16"),
)
"""Cases small enough for an interpreter."""


def _llama8b(name: str, arrays: int, ids: int) -> Case:
    return Case(name, arrays, ids, kv_heads=8, page_size=64, head_dim=128, dtype="bfloat16")


LARGE_CASES = (
    _llama8b("llama 8b 64 tokens", 64, 1),
    _llama8b("llama 8b 2k tokens", 64, 33),
    _llama8b("llama 8b 2k tokens of 4 layers", 8, 33),
    _llama8b("llama 8b 8k tokens of 4 layers", 8, 130),
)
"""Cases of Llama 3 8B, for accelerators."""
