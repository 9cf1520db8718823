"""The shapes at which append_attention is tested and timed: paged_attention's cases, but the newest
token comes from a projection and is not in the pages yet."""

from dataclasses import dataclass, replace
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_write import cases as write_cases
from pallas_kernels.paged_attention import cases as paged_cases
from pallas_kernels.paged_attention.cases import CASES, LARGE_CASES, Case, Pool
from pallas_kernels.poison import Poisoned, some
from pallas_kernels.quantised import QuantisedPages

__all__ = ["CASES", "LARGE_CASES", "Case", "Inputs", "make_inputs"]


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, as numpy arrays: inputs of the write, and of the attention after
    it."""

    write: write_cases.Inputs  # its pools are the elements of the pools of `paged`
    paged: paged_cases.Inputs

    @property
    def operands(self) -> tuple[Pool | None, ...]:
        """Positional arguments of the operation."""
        return *self.write.operands[:5], *self.paged.operands[1:]

    @property
    def pools(self) -> tuple[Pool, Pool]:
        """The pools of K and of V before the newest tokens are written."""
        return self.paged.k_pages, self.paged.v_pages

    @cached_property
    def expected(self) -> np.ndarray:
        """The expected attention over pages without scales, float32[B, N, H]. In quantised pages
        the newest tokens are rounded; there use `attention` over the pools that come out."""
        k_pages, v_pages = self.write.k_pages.copy(), self.write.v_pages.copy()
        for pool, new in zip((k_pages, v_pages), self.write.made[1:], strict=True):
            pool[:, *self.write.written] = new
        return self.attention(k_pages, v_pages)

    def attention(self, k_pages: Pool, v_pages: Pool) -> np.ndarray:
        """Compute the attention over pools that hold the newest tokens, float32[B, N, H]."""
        q = self.write.made[0].astype(self.paged.q.dtype)
        return replace(self.paged, q=q, k_pages=k_pages, v_pages=v_pages).expected


def make_inputs(case: Case, seed: int) -> Inputs:
    """Make random arguments. The newest token's slot in the pages holds other numbers; an empty
    row's qkv is NaN."""
    paged = paged_cases.make_inputs(case, seed)
    rng = np.random.default_rng([seed, 1])
    rows, lens, page_size = len(case.kv_lens), paged.kv_lens, case.page_size
    newest = np.maximum(lens - 1, 0)
    page = paged.page_table[np.arange(rows), newest // page_size]
    slots = np.where(lens > 0, page * page_size + newest % page_size, 0)
    qkv = rng.standard_normal(
        (rows, case.kv_heads, case.group + 2, case.head_dim), np.float32
    ).astype(jnp.dtype(case.dtype))
    qkv[lens == 0] = np.nan
    angle = rng.uniform(0, 2 * np.pi, (rows, case.head_dim // 2)).astype(np.float32)
    write = write_cases.Inputs(
        write_cases.Case(
            case.name,
            chunks=tuple((n - 1, 1) for n in case.kv_lens if n),
            padding=sum(n == 0 for n in case.kv_lens),
            kv_heads=case.kv_heads,
            group=case.group,
            head_dim=case.head_dim,
            page_size=page_size,
            dtype=case.dtype,
        ),
        qkv=qkv,
        scale=rng.uniform(0.5, 2, rows).astype(np.float32),
        bias=None,
        cos=np.cos(angle),
        sin=np.sin(angle),
        k_pages=_elements(paged.k_pages),
        v_pages=_elements(paged.v_pages),
        slot_mapping=slots.astype(np.int32),
    )
    return Inputs(write, paged)


def poisoned(inputs: Inputs, value: float) -> Poisoned:
    """Poison the newest tokens of some rows."""
    lens = inputs.paged.kv_lens
    which = some(len(lens)) & (lens > 0)
    qkv = inputs.write.qkv.copy()
    for turn, row in enumerate(np.flatnonzero(which)):
        write_cases.poison_token(qkv[row], value, turn)
    _, *operands = inputs.operands
    spared = write_cases.pools_without(inputs.write, which)
    return Poisoned(
        (qkv, *operands),
        spared=lambda out: (out[0][~which], spared(out[1:])),
        spoiled=lambda out: [out[0][which]],
        sound=lambda out: write_cases.pages_are_sound(inputs.write, which, value, out[1:]),
    )


def _elements(pool: Pool) -> np.ndarray:
    return pool.elements if isinstance(pool, QuantisedPages) else pool
