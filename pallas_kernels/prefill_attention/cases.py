"""The shapes at which prefill_attention is tested and timed, with hostile inputs and expected
results."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.naive import naive_attention, normal
from pallas_kernels.poison import Poisoned


@dataclass(frozen=True)
class Case:
    """One shape of the operation."""

    name: str
    chunks: tuple[tuple[int, int], ...]
    """For each sequence, its tokens in the batch and its tokens in its pages."""
    padding: int = 0
    """Padding tokens, padding sequences and padding pages, each this many."""
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "float32"
    logit_soft_cap: float | None = None
    sliding_window: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the operation."""
        return {
            "scale": self.head_dim**-0.5,
            "logit_soft_cap": self.logit_soft_cap,
            "sliding_window": self.sliding_window,
        }

    def visible(self, q_len: int, kv_len: int) -> np.ndarray:
        """Return bool[q_len, kv_len]: the tokens that each token of a chunk sees."""
        behind = np.arange(kv_len - q_len, kv_len)[:, None] - np.arange(kv_len)
        return (behind >= 0) & (behind < (self.sliding_window or kv_len))

    @property
    def work(self) -> tuple[float, str]:
        """Floating-point operations of the two products over visible pairs, and their unit."""
        window = self.sliding_window
        pairs = 0
        for q_len, kv_len in self.chunks:
            seen = np.arange(kv_len - q_len, kv_len) + 1
            pairs += int((seen if window is None else np.minimum(seen, window)).sum())
        return 4.0 * pairs * self.kv_heads * self.group * self.head_dim, "FLOP"


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, as numpy arrays."""

    case: Case
    q: np.ndarray  # [T, N, H]
    k_pages: np.ndarray  # [K, P, S, H]
    v_pages: np.ndarray  # [K, P, S, H]
    kv_pages: np.ndarray  # i32[Z]
    cu_pages: np.ndarray  # i32[B + 1]
    cu_q_lens: np.ndarray  # i32[B + 1]
    kv_lens: np.ndarray  # i32[B]

    @property
    def operands(self) -> tuple[np.ndarray, ...]:
        """Positional arguments of the operation."""
        return (
            self.q,
            self.k_pages,
            self.v_pages,
            self.kv_pages,
            self.cu_pages,
            self.cu_q_lens,
            self.kv_lens,
        )

    @cached_property
    def expected(self) -> np.ndarray:
        """The expected attention, float32[T, N, H]."""
        out = np.zeros(self.q.shape, np.float32)
        for b, (q_len, kv_len) in enumerate(self.case.chunks):
            if q_len:
                tokens = slice(self.cu_q_lens[b], self.cu_q_lens[b + 1])
                pages = self.kv_pages[self.cu_pages[b] : self.cu_pages[b + 1]]
                visible = self.case.visible(q_len, kv_len)
                first = int(visible.argmax(axis=1).min())
                k, v = (
                    pool[:, pages].reshape(self.case.kv_heads, -1, self.case.head_dim)
                    for pool in (self.k_pages, self.v_pages)
                )
                out[tokens] = naive_attention(
                    self.q[tokens],
                    k[:, first:kv_len].swapaxes(0, 1),
                    v[:, first:kv_len].swapaxes(0, 1),
                    visible[:, first:],
                    scale=self.case.head_dim**-0.5,
                    logit_soft_cap=self.case.logit_soft_cap,
                )
        return out


def make_inputs(case: Case, seed: int) -> Inputs:
    """Make random arguments. Pages are scattered over the pool, and padding names any page. Every
    number that no token sees is NaN: other pages, the rest of a last page, tokens before the
    window."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    counts = [-(-kv_len // case.page_size) for _, kv_len in case.chunks]
    pages = sum(counts) + 2  # also the null page, and a page of no row
    kv_pages = rng.integers(pages, size=sum(counts) + case.padding + 1)
    kv_pages[: sum(counts)] = 1 + rng.permutation(pages - 1)[: sum(counts)]
    cu_pages = np.cumsum([0, *counts])
    seen = np.zeros((pages, case.page_size), bool)
    for b, (q_len, kv_len) in enumerate(case.chunks):
        position = np.arange(counts[b] * case.page_size).reshape(counts[b], case.page_size)
        first = 0 if case.sliding_window is None else kv_len - q_len + 1 - case.sliding_window
        seen[kv_pages[cu_pages[b] : cu_pages[b + 1]]] = (first <= position) & (position < kv_len)

    def pool() -> np.ndarray:
        shape = (case.kv_heads, pages, case.page_size, case.head_dim)
        values = normal(rng, shape, lambda x: x.astype(dtype))
        values[:, ~seen] = np.nan
        return values

    q_lens = [q_len for q_len, _ in case.chunks]
    shape = (sum(q_lens) + case.padding, case.kv_heads * case.group, case.head_dim)
    none = [0] * case.padding
    return Inputs(
        case,
        q=rng.standard_normal(shape, np.float32).astype(dtype),
        k_pages=pool(),
        v_pages=pool(),
        kv_pages=kv_pages.astype(np.int32),
        cu_pages=np.cumsum([0, *counts, *none]).astype(np.int32),
        cu_q_lens=np.cumsum([0, *q_lens, *none]).astype(np.int32),
        kv_lens=np.asarray([*(kv_len for _, kv_len in case.chunks), *none], np.int32),
    )


def poisoned(inputs: Inputs, value: float, *, raw: bool = False) -> Poisoned:
    """Poison the queries and all pages of odd sequences, and K and V of the newer half of even
    sequences' chunks; the results of their older tokens must not change.

    Args:
      raw: whether V of even sequences is poisoned even if the value is not finite, although
        `pallas_kernels.finite` keeps such V out of pages.
    """
    case, q = inputs.case, inputs.q.copy()
    k_pages, v_pages = inputs.k_pages.copy(), inputs.v_pages.copy()
    which = np.zeros(len(q), bool)
    for b, (q_len, kv_len) in enumerate(case.chunks):
        own = inputs.kv_pages[inputs.cu_pages[b] : inputs.cu_pages[b + 1]]
        if b % 2:
            q[inputs.cu_q_lens[b] : inputs.cu_q_lens[b + 1]] = value
            k_pages[:, own] = v_pages[:, own] = value
            which[inputs.cu_q_lens[b] : inputs.cu_q_lens[b + 1]] = True
            continue
        newer = q_len // 2
        page, position = np.divmod(np.arange(kv_len - newer, kv_len), case.page_size)
        k_pages[:, own[page], position] = value if np.isfinite(value) else np.nan
        if raw or np.isfinite(value):
            v_pages[:, own[page], position] = value
        which[inputs.cu_q_lens[b + 1] - newer : inputs.cu_q_lens[b + 1]] = True
    return Poisoned(
        (q, k_pages, v_pages, *inputs.operands[3:]),
        spared=lambda out: out[~which],
        spoiled=lambda out: [out[which]],
    )


def _whole(*lens: int) -> tuple[tuple[int, int], ...]:
    return tuple((n, n) for n in lens)


_CHUNKS = ((40, 100), (1, 17), (0, 30), (64, 64), (3, 3), (0, 0), (130, 300))

CASES = (
    Case("one token", _whole(1), kv_heads=1, group=1),
    Case("page edges", _whole(1, 15, 16, 17, 31, 32, 33)),
    Case("one prompt", _whole(200)),
    Case("smollm2", _whole(70, 129, 57), kv_heads=3, group=3),
    Case("chunks", _CHUNKS),
    Case("padded", _CHUNKS, padding=9),
    Case("only padding", ((0, 0),), padding=5),
    Case("many short", _whole(*range(1, 30)), padding=1),
    Case("page 8", _CHUNKS, page_size=8),
    Case("page 128", _CHUNKS, page_size=128),
    Case("head dim 128", _CHUNKS, head_dim=128, group=2),
    Case("soft cap", _CHUNKS, logit_soft_cap=2.0),
    Case("window", _CHUNKS, sliding_window=20),
    Case("window of 1", _CHUNKS, sliding_window=1),
    Case("window and soft cap", _CHUNKS, sliding_window=90, logit_soft_cap=5.0),
    Case("bf16", _CHUNKS, padding=4, dtype="bfloat16"),
    Case(
        "bf16 head dim 128",
        ((150, 200), (64, 64)),
        padding=3,
        kv_heads=1,
        group=2,
        head_dim=128,
        page_size=64,
        dtype="bfloat16",
    ),
    Case("bf16 many short", _whole(*range(1, 20)), 9, kv_heads=1, group=1, dtype="bfloat16"),
    Case("bf16 gqa 8", ((20, 50),), kv_heads=1, group=8, page_size=8, dtype="bfloat16"),
    Case(
        "bf16 window",
        ((140, 300), (5, 40)),
        kv_heads=1,
        group=1,
        page_size=128,
        dtype="bfloat16",
        sliding_window=100,
    ),
    Case("bf16 soft cap", ((30, 140),), kv_heads=2, group=1, dtype="bfloat16", logit_soft_cap=3.0),
)
"""Cases small enough for any machine."""


def _llama8b(name: str, chunks: tuple[tuple[int, int], ...]) -> Case:
    return Case(f"llama 8b {name}", chunks, 0, 8, 4, head_dim=128, page_size=64, dtype="bfloat16")


LARGE_CASES = (
    _llama8b("1 x 1k", _whole(1024)),
    _llama8b("8 x 256", _whole(*[256] * 8)),
    _llama8b("chunk of 512 at 4k", ((512, 4096),)),
)
"""Cases of one layer of Llama 3 8B, for accelerators."""
