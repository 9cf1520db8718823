"""The shapes at which paged_attention is tested and timed, with hostile inputs and expected
results."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.naive import naive_attention, normal
from pallas_kernels.poison import Poisoned, some
from pallas_kernels.quantised import LIMITS, QuantisedPages


@dataclass(frozen=True)
class Case:
    """One shape of the operation."""

    name: str
    kv_lens: tuple[int, ...]
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "float32"
    kv_dtype: str | None = None
    """Type of the pages' elements, which then have scales; None takes `dtype`, without scales."""
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

    @property
    def width(self) -> int:
        """Entries of a row of the page table: one more than the longest row's pages."""
        return max(map(self.pages_of, self.kv_lens)) + 1

    def pages_of(self, kv_len: int) -> int:
        """Number of pages of a row."""
        return -(-kv_len // self.page_size)

    def first_visible(self, kv_len: int) -> int:
        """Return the position of the oldest token that a row sees."""
        return 0 if self.sliding_window is None else max(kv_len - self.sliding_window, 0)

    @property
    def work(self) -> tuple[float, str]:
        """Bytes of K and V that one call must read."""
        tokens = sum(n - self.first_visible(n) for n in self.kv_lens)
        size = self.head_dim * jnp.dtype(self.kv_dtype or self.dtype).itemsize
        return 2.0 * tokens * self.kv_heads * (size + 4 * (self.kv_dtype is not None)), "B"


Pool = np.ndarray | QuantisedPages
"""K or V, as numpy arrays."""


def decoded(pool: Pool, *at: np.ndarray) -> np.ndarray:
    """Decode a pool's numbers at some pages, or at positions in pages, as float32[K, ..., H].

    Args:
      pool: [K, P, S, H].
      *at: integers of one shape: the pages, and, to read one position of each, the positions.
    """
    where: Any = (slice(None), *at)
    if isinstance(pool, QuantisedPages):
        return pool.elements[where].astype(np.float32) * pool.scales[where][..., None]
    return pool[where].astype(np.float32)


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, as numpy arrays."""

    case: Case
    q: np.ndarray  # [B, N, H]
    k_pages: Pool  # [K, P, S, H]
    v_pages: Pool  # [K, P, S, H]
    page_table: np.ndarray  # i32[B, W]
    kv_lens: np.ndarray  # i32[B]

    @property
    def operands(self) -> tuple[Pool, ...]:
        """Positional arguments of the operation."""
        return self.q, self.k_pages, self.v_pages, self.page_table, self.kv_lens

    @cached_property
    def expected(self) -> np.ndarray:
        """The expected attention, float32[B, N, H]."""
        out = np.zeros(self.q.shape, np.float32)
        for row, kv_len in enumerate(self.kv_lens):
            if kv_len:
                pages = self.page_table[row, : self.case.pages_of(kv_len)]
                seen = slice(self.case.first_visible(kv_len), kv_len)
                shape = self.case.kv_heads, -1, self.case.head_dim
                k, v = (
                    decoded(pool, pages).reshape(shape)[:, seen]
                    for pool in (self.k_pages, self.v_pages)
                )
                out[row] = naive_attention(
                    self.q[row : row + 1],
                    k.swapaxes(0, 1),
                    v.swapaxes(0, 1),
                    np.ones((1, k.shape[1]), bool),
                    scale=self.case.head_dim**-0.5,
                    logit_soft_cap=self.case.logit_soft_cap,
                )[0]
        return out


def make_inputs(case: Case, seed: int) -> Inputs:
    """Make random arguments. Rows' pages are scattered over the pool, and table entries past a
    row's end are any pages. Every number that no row sees is NaN: other pages, the null page, the
    rest of a last page, tokens before the window."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    rows, width, page_size = len(case.kv_lens), case.width, case.page_size
    used = sum(map(case.pages_of, case.kv_lens))
    pages = used + 2  # also the null page, and a page of no row
    order = 1 + rng.permutation(pages - 1)
    page_table = rng.integers(pages, size=(rows, width)).astype(np.int32)
    seen = np.zeros((pages, page_size), bool)
    taken = 0
    for row, kv_len in enumerate(case.kv_lens):
        count = case.pages_of(kv_len)
        own = order[taken : taken + count]
        taken += count
        page_table[row, :count] = own
        position = np.arange(count * page_size).reshape(count, page_size)
        seen[own] = (case.first_visible(kv_len) <= position) & (position < kv_len)

    def pool() -> Pool:
        shape = (case.kv_heads, pages, page_size, case.head_dim)
        if case.kv_dtype is not None:
            return _scaled(rng, shape, seen, case.kv_dtype)
        values = normal(rng, shape, lambda x: x.astype(dtype))
        values[:, ~seen] = np.nan
        return values

    heads = case.kv_heads * case.group
    q = rng.standard_normal((rows, heads, case.head_dim), np.float32).astype(dtype)
    lens = np.asarray(case.kv_lens, np.int32)
    return Inputs(case, q, pool(), pool(), page_table, lens)


def poisoned(inputs: Inputs, value: float) -> Poisoned:
    """Poison the queries and all pages of some rows."""
    which = some(len(inputs.kv_lens)) & (inputs.kv_lens > 0)
    lists = zip(inputs.page_table[which], inputs.kv_lens[which], strict=True)
    pages = [page for table, kv_len in lists for page in table[: inputs.case.pages_of(kv_len)]]
    q, k_pages, v_pages = inputs.q.copy(), *map(_copy, (inputs.k_pages, inputs.v_pages))
    q[which] = value
    for pool in (k_pages, v_pages):
        (pool.scales if isinstance(pool, QuantisedPages) else pool)[:, pages] = value
    return Poisoned(
        (q, k_pages, v_pages, inputs.page_table, inputs.kv_lens),
        spared=lambda out: out[~which],
        spoiled=lambda out: [out[which]],
    )


def _copy(pool: Pool) -> Any:
    return QuantisedPages(*map(np.copy, pool)) if isinstance(pool, QuantisedPages) else pool.copy()


def _scaled(
    rng: np.random.Generator, shape: tuple[int, ...], seen: np.ndarray, dtype: str
) -> QuantisedPages:
    """Draw normal numbers in a type, with scales of any size. Where no row sees them, scales are
    NaN and elements are any numbers of the type."""
    limit = LIMITS[dtype]

    def convert(values: np.ndarray) -> np.ndarray:
        fitting = np.clip(values * (limit / 3), -limit, limit)
        return (np.rint(fitting) if dtype == "int8" else fitting).astype(jnp.dtype(dtype))

    elements = normal(rng, shape, convert)
    scales = normal(rng, shape[:-1], lambda x: np.exp(x) * np.float32(3 / limit))
    elements[:, ~seen] = limit if dtype == "int8" else np.nan
    scales[:, ~seen] = np.nan
    return QuantisedPages(elements, scales)


_EDGES = (0, 1, 15, 16, 17, 31, 32, 33, 0, 100)  # around pages of 16

CASES = (
    Case("page edges", _EDGES),
    Case("smollm2", (20, 300, 0, 129), kv_heads=3, group=3),
    Case("one row", (1,), kv_heads=1, group=1),
    Case("no row", (0, 0)),
    Case("page 8", (7, 8, 9, 700), page_size=8),
    Case("page 64", (63, 64, 65, 513), page_size=64),
    Case("page 128", (127, 128, 129, 640), page_size=128),
    Case("head dim 128", (40, 1000), kv_heads=2, group=4, head_dim=128),
    Case("head dim 256", (40, 300), kv_heads=1, group=8, head_dim=256),
    Case("soft cap", _EDGES, logit_soft_cap=2.0),
    Case("window", _EDGES, sliding_window=20),
    Case("window of 1", (0, 1, 50), sliding_window=1),
    Case("window and soft cap", (5, 900), sliding_window=300, logit_soft_cap=5.0),
    Case("bf16", (0, 1, 16, 33), dtype="bfloat16"),
    Case("bf16 gqa 8", (70, 300), kv_heads=2, group=8, head_dim=128, dtype="bfloat16"),
    Case("bf16 page 64", (64, 65, 300), head_dim=128, page_size=64, dtype="bfloat16"),
    Case("bf16 page 128", (130, 500), head_dim=128, page_size=128, dtype="bfloat16"),
    Case("bf16 group 1", (0, 200), kv_heads=1, group=1, head_dim=128, dtype="bfloat16"),
    Case("bf16 group 16", (33, 200), kv_heads=1, group=16, head_dim=128, dtype="bfloat16"),
    Case("bf16 head dim 256", (40, 150), kv_heads=1, group=8, head_dim=256, dtype="bfloat16"),
    Case("bf16 soft cap", (5, 200), dtype="bfloat16", logit_soft_cap=3.0),
    Case("bf16 window", (5, 300), dtype="bfloat16", sliding_window=100),
    Case("int8", _EDGES, kv_dtype="int8"),
    Case("int8 window", _EDGES, kv_dtype="int8", sliding_window=20),
    Case("float8", (0, 1, 16, 33), kv_dtype="float8_e4m3fn"),
    Case("bf16 int8", (0, 1, 16, 33), dtype="bfloat16", kv_dtype="int8"),
    Case("bf16 int8 page 32", (0, 1, 31, 32, 33, 64, 65), 2, 3, 64, 32, "bfloat16", "int8"),
    Case("bf16 int8 gqa 8", (70, 300), 2, 8, 128, 64, "bfloat16", "int8"),
    Case("bf16 int8 page 128", (130, 500), 2, 4, 128, 128, "bfloat16", "int8"),
    Case("bf16 int8 head dim 256", (40, 150), 1, 8, 256, 64, "bfloat16", "int8"),
    Case("bf16 int8 soft cap", (5, 200), 1, 4, 64, 32, "bfloat16", "int8", logit_soft_cap=3.0),
    Case("bf16 int8 window", (5, 300), 1, 4, 128, 64, "bfloat16", "int8", sliding_window=100),
    Case("bf16 float8", (20, 150), dtype="bfloat16", kv_dtype="float8_e4m3fn"),
)
"""Cases small enough for an interpreter."""


def _llama8b(
    name: str, kv_lens: tuple[int, ...], page_size: int = 64, kv_dtype: str | None = None
) -> Case:
    return Case(f"llama 8b {name}", kv_lens, 8, 4, 128, page_size, "bfloat16", kv_dtype)


LARGE_CASES = (
    _llama8b("1 x 1k", (1024,)),
    _llama8b("1 x 8k", (8192,)),
    _llama8b("1 x 32k", (32768,)),
    _llama8b("16 x 1k", (1024,) * 16),
    _llama8b("64 x 1k", (1024,) * 64),
    _llama8b("64 x 1k page 16", (1024,) * 64, page_size=16),
    _llama8b("64 x 1k page 128", (1024,) * 64, page_size=128),
    _llama8b("128 x 1k", (1024,) * 128),
    _llama8b("64 x 4k", (4096,) * 64),
    _llama8b("63 x 1k and 1 x 8k", (*(1060,) * 40, 8192, *(1060,) * 23)),
    replace(
        _llama8b("window, short, empty and long", (0, 1, *(200, 5000) * 31, 8192)),
        sliding_window=4000,
    ),
    _llama8b("int8 1 x 8k", (8192,), kv_dtype="int8"),
    _llama8b("int8 64 x 1k", (1024,) * 64, kv_dtype="int8"),
    _llama8b("int8 128 x 1k", (1024,) * 128, kv_dtype="int8"),
    _llama8b("int8 64 x 4k", (4096,) * 64, kv_dtype="int8"),
    _llama8b("int8 ragged", tuple(range(40, 8192, 256)), kv_dtype="int8"),
    _llama8b("ragged", tuple(range(40, 8192, 256))),
)
"""Cases of one layer of Llama 3 8B, for accelerators."""
