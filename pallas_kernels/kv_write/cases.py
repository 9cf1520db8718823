"""The shapes at which rope_and_write is tested and timed, with hostile inputs and expected
results."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.naive import normal
from pallas_kernels.paged_attention.cases import decoded
from pallas_kernels.poison import Poisoned, some


@dataclass(frozen=True)
class Case:
    """One shape of the operation."""

    name: str
    chunks: tuple[tuple[int, int], ...]
    """For each sequence, the position of its first token in the batch and its tokens there."""
    padding: int = 0
    """Padding tokens beyond the real ones."""
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "float32"
    """Type of the pages."""
    qkv_dtype: str | None = None
    """Type of qkv; None takes that of the pages."""
    bias: bool = False
    shuffled: bool = False
    """Whether all tokens, padding included, are in random order."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the operation."""
        return {}

    @property
    def tokens(self) -> int:
        """Number of tokens of the batch, padding included."""
        return sum(count for _, count in self.chunks) + self.padding

    @property
    def work(self) -> tuple[float, str]:
        """Bytes of qkv that one call must read, and of q, k and v that it must write."""
        rows = self.kv_heads * (self.group + 2) * self.head_dim
        kept = 2 * self.kv_heads * self.head_dim
        qkv_size = jnp.dtype(self.qkv_dtype or self.dtype).itemsize
        bytes_of_token = (2 * rows - kept) * qkv_size + kept * jnp.dtype(self.dtype).itemsize
        return float(self.tokens * bytes_of_token), "B"


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, as numpy arrays."""

    case: Case
    qkv: np.ndarray  # [T, K, J, H]
    scale: np.ndarray  # f32[T]
    bias: np.ndarray | None  # [K, J, H]
    cos: np.ndarray  # f32[T, H/2]
    sin: np.ndarray  # f32[T, H/2]
    k_pages: np.ndarray  # [K, P, S, H]
    v_pages: np.ndarray  # [K, P, S, H]
    slot_mapping: np.ndarray  # i32[T]

    @property
    def operands(self) -> tuple[np.ndarray | None, ...]:
        """Positional arguments of the operation."""
        return (
            self.qkv,
            self.scale,
            self.bias,
            self.cos,
            self.sin,
            self.k_pages,
            self.v_pages,
            self.slot_mapping,
        )

    @property
    def real(self) -> np.ndarray:
        """Tokens that are not padding, bool[T]."""
        return self.slot_mapping >= self.case.page_size

    @property
    def written(self) -> tuple[np.ndarray, np.ndarray]:
        """Page, and position in the page, that each real token writes, in token order."""
        return np.divmod(self.slot_mapping[self.real], self.case.page_size)

    @property
    def kept(self) -> np.ndarray:
        """Slots that must not change, bool[P, S]: no token writes them, and they are not in the
        null page."""
        kept = np.ones(self.k_pages.shape[1:3], bool)
        kept[self.written] = False
        kept[0] = False
        return kept

    @cached_property
    def made(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Expected q [T, N, H], meaningless for padding, and K and V of the real tokens,
        [K, R, H], all float32."""
        x = self.qkv.astype(np.float32) * self.scale[:, None, None, None]
        if self.bias is not None:
            x = x + self.bias.astype(np.float32)
        half = self.case.head_dim // 2
        angle = (self.cos + 1j * self.sin)[:, None, None]
        turned = (x[..., :half] + 1j * x[..., half:]) * angle
        rotated = np.concatenate([turned.real, turned.imag], axis=-1)
        q = rotated[:, :, :-2].reshape(len(x), -1, self.case.head_dim)
        k, v = (new[self.real].swapaxes(0, 1) for new in (rotated[:, :, -2], x[:, :, -1]))
        return q, k, v

    @property
    def expected(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Expected q [T, N, H] and pools [K, P, S, H], float32; padding and the null page are
        meaningless."""
        q, k, v = self.made
        pools = [pages.astype(np.float32) for pages in (self.k_pages, self.v_pages)]
        for pool, new in zip(pools, (k, v), strict=True):
            pool[:, *self.written] = new
        return q, pools[0], pools[1]


def make_inputs(case: Case, seed: int) -> Inputs:
    """Make random arguments. Pages are scattered over the pool; its other pages hold random numbers
    that must survive. Padding tokens are NaN and write all over the null page."""
    rng = np.random.default_rng(seed)
    dtype, qkv_dtype = jnp.dtype(case.dtype), jnp.dtype(case.qkv_dtype or case.dtype)
    page_size, half = case.page_size, case.head_dim // 2
    counts = [-(-(first + count) // page_size) for first, count in case.chunks]
    pages = sum(counts) + 2  # also the null page, and a page of no sequence
    own = 1 + rng.permutation(pages - 1)
    slots = [rng.integers(page_size, size=case.padding)]
    for (first, count), end in zip(case.chunks, np.cumsum(counts), strict=True):
        position = np.arange(first, first + count)
        page = own[end - -(-(first + count) // page_size) + position // page_size]
        slots.append(page * page_size + position % page_size)
    slot_mapping = np.concatenate([*slots[1:], slots[0]])
    if case.shuffled:
        slot_mapping = rng.permutation(slot_mapping)

    def normals(*shape: int, dtype: np.dtype) -> np.ndarray:
        return normal(rng, shape, lambda x: x.astype(dtype))

    rows = (case.kv_heads, case.group + 2, case.head_dim)
    pool = (case.kv_heads, pages, page_size, case.head_dim)
    qkv = normals(case.tokens, *rows, dtype=qkv_dtype)
    qkv[slot_mapping < page_size] = np.nan
    angle = rng.uniform(0, 2 * np.pi, (case.tokens, half)).astype(np.float32)
    return Inputs(
        case,
        qkv=qkv,
        scale=rng.uniform(0.5, 2, case.tokens).astype(np.float32),
        bias=normals(*rows, dtype=qkv_dtype) if case.bias else None,
        cos=np.cos(angle),
        sin=np.sin(angle),
        k_pages=normals(*pool, dtype=dtype),
        v_pages=normals(*pool, dtype=dtype),
        slot_mapping=slot_mapping.astype(np.int32),
    )


def poison_token(qkv: np.ndarray, value: float, turn: int) -> None:
    """Spoil qkv [K, J, H] of one token: a number of V in each head, one of K, or all numbers."""
    at = (7 * turn) % qkv.shape[-1]
    match turn % 3:
        case 0:
            qkv[:, -1, at] = value
        case 1:
            qkv[:, -2, at] = value
        case _:
            qkv[...] = value


def poisoned(inputs: Inputs, value: float) -> Poisoned:
    """Poison some tokens of the inputs."""
    which = some(len(inputs.qkv)) & inputs.real
    qkv = inputs.qkv.copy()
    for turn, token in enumerate(np.flatnonzero(which)):
        poison_token(qkv[token], value, turn)
    _, *operands = inputs.operands
    spared = pools_without(inputs, which)
    return Poisoned(
        (qkv, *operands),
        spared=lambda out: (out[0][inputs.real & ~which], spared(out[1:])),
        spoiled=lambda out: [],
        sound=lambda out: pages_are_sound(inputs, which, value, out[1:]),
    )


def pools_without(inputs: Inputs, which: np.ndarray) -> Callable[[Any], Any]:
    """Return a function that selects a pool's slots which neither the tokens `which` bool[T] nor
    padding write."""
    page, position = np.divmod(inputs.slot_mapping[which], inputs.case.page_size)

    def without(pool: np.ndarray) -> np.ndarray:
        pool = pool.copy()
        pool[:, page, position] = 0
        pool[:, 0] = 0
        return pool

    return lambda pools: jax.tree.map(without, pools)


def pages_are_sound(inputs: Inputs, which: np.ndarray, value: float, pools: Any) -> bool:
    """Whether the KV that the tokens `which` bool[T] wrote obeys `pallas_kernels.finite`: all of V
    is finite; each KV head of K is not finite, if the poison is not."""
    at = np.divmod(inputs.slot_mapping[which], inputs.case.page_size)
    k, v = (np.isfinite(decoded(pool, *at)) for pool in pools)
    return bool(v.all()) and (np.isfinite(value) or not k.all(axis=-1).any())


_CHUNKS = ((0, 40), (16, 1), (13, 3), (60, 64), (5, 0), (31, 2))
_DECODE = tuple((first, 1) for first in (0, 1, 15, 16, 17, 31, 32, 100))

CASES = (
    Case("one token", ((0, 1),), kv_heads=1, group=1),
    Case("decode", _DECODE),
    Case("decode with idle rows", _DECODE, padding=5, shuffled=True),
    Case("one prompt", ((0, 200),)),
    Case("smollm2", ((0, 70), (130, 57)), kv_heads=3, group=3),
    Case("chunks", _CHUNKS),
    Case("padded", _CHUNKS, padding=70),
    Case("only padding", (), padding=20),
    Case("in no order", _CHUNKS, padding=9, shuffled=True),
    Case("bias", _CHUNKS, padding=3, bias=True),
    Case("page 8", _CHUNKS, page_size=8),
    Case("page 64", _CHUNKS, page_size=64, padding=3),
    Case("page 128", _CHUNKS, page_size=128),
    Case("head dim 128", _CHUNKS, head_dim=128, kv_heads=1, group=8),
    Case("head dim 256", ((3, 20),), head_dim=256, group=2),
    Case("bf16", _CHUNKS, padding=4, dtype="bfloat16"),
    Case("bf16 decode", _DECODE, padding=2, bias=True, dtype="bfloat16"),
    Case("bf16 in no order", _CHUNKS, padding=9, shuffled=True, dtype="bfloat16"),
    Case("bf16 gqa 8", _CHUNKS, group=8, head_dim=128, page_size=64, dtype="bfloat16"),
    Case("bf16 gqa 3", _CHUNKS, group=3, padding=2, bias=True, dtype="bfloat16"),
    Case("bf16 page 128", _CHUNKS, head_dim=128, page_size=128, bias=True, dtype="bfloat16"),
    Case("bf16 of float32", _CHUNKS, padding=1, dtype="bfloat16", qkv_dtype="float32"),
)
"""Cases small enough for an interpreter."""


def _llama8b(name: str, chunks: tuple[tuple[int, int], ...], page_size: int = 64) -> Case:
    return Case(
        f"llama 8b {name}", chunks, 0, 8, 4, head_dim=128, page_size=page_size, dtype="bfloat16"
    )


LARGE_CASES = (
    _llama8b("1 row at 1k", ((1024, 1),)),
    _llama8b("64 rows at 1k", ((1024, 1),) * 64),
    _llama8b("64 rows at 1k page 16", ((1024, 1),) * 64, page_size=16),
    _llama8b("prompt of 1k", ((0, 1024),)),
    _llama8b("8 chunks of 256 at 1k", ((1024, 256),) * 8),
)
"""Cases of one layer of Llama 3 8B, for accelerators."""
