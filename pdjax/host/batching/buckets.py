"""The padded sizes of batches.

A jitted step is compiled once for each shape it meets, so every batch is padded to one of a few
buckets, all of which can be driven once before the first request. Padding and buckets exist only
in this folder.
"""

from bisect import bisect_left
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import count, takewhile

import numpy as np

from pdjax.config import DecodeConfig, PrefillConfig
from pdjax.config.checks import MOST_TOKENS

_FEW_TOKENS = 256
"""Contexts this short share one width of decode's page table."""

_FEW_ROWS = 8
"""The smallest size of a tick beside that of one row."""

_WIDE = 2048
"""Tokens of the shortest table that ticks of few rows have beside the longest."""

_FEW_MIXED = 128
"""Fewest prompt tokens of which a mixed step is worth a program of its own."""

_FEW_LISTED = 256
"""Pages of the shortest list of a prefill step."""

_MOST_ENTRIES = 2**28
"""Numbers of a table with a row a sequence: 1 GB."""


@dataclass(frozen=True)
class Buckets:
    """The padded sizes that batches of an engine may have, ascending; the last of each holds the
    largest batch.

    Attributes:
      page_size: S of the engine's pool.
      context: C of a history, tokens.
      token_budget: most tokens that are packed into a prefill step.
      sequences: B of a prefill step.
      tokens: T of a prefill step. `step_pages`: Z of it. Both are empty where the engine accepts
        none.
      table_pages: W of a decode page table; empty where the engine accepts no decode step.
      tick_rows: n of a tick; sizes from all rows of a microbatch on stand for all of them.
      mixed_tokens: T of a mixed step; empty where the engine mixes none.
    """

    page_size: int
    context: int
    token_budget: int = 0
    sequences: int = 0
    tokens: tuple[int, ...] = ()
    step_pages: tuple[int, ...] = ()
    table_pages: tuple[int, ...] = ()
    tick_rows: tuple[int, ...] = ()
    mixed_tokens: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        prefill: PrefillConfig | None,
        decode: DecodeConfig | None,
        page_size: int,
        max_model_len: int,
    ) -> "Buckets":
        """The configured buckets, or where none are configured, few that waste little.

        Each bucket of a step is a compilation of the whole model, so those are a factor of four
        apart. An entry of the list of pages that a prefill step reads costs its upload alone, since
        attention visits what is listed: a factor of 16. A wide page table lets decode attention cut
        rows into more parts, which short rows leave empty.

        Args:
          prefill, decode: of the steps that the engine accepts; None where it accepts none.

        Raises:
          ValueError: configured buckets that cannot hold the longest context, or tables of so many
            rows that no host could hold them.
        """
        if max_model_len > MOST_TOKENS:
            raise ValueError(f"model.max_model_len={max_model_len}: must be at most {MOST_TOKENS}")
        context = -(-max_model_len // page_size)
        buckets = cls(page_size, max_model_len)
        if prefill is not None:
            _check_hold("prefill.page_buckets", prefill.page_buckets, context, max_model_len)
            _check_table(
                "prefill.max_sequences", prefill.max_sequences, max_model_len, max_model_len
            )
            # Enough that a full token budget fits even if every prompt's last page is nearly empty.
            packed = -(-prefill.token_budget // page_size) + prefill.max_sequences
            buckets = replace(
                buckets,
                token_budget=prefill.token_budget,
                sequences=prefill.max_sequences,
                tokens=prefill.token_buckets or spread(prefill.token_budget, 16, 4),
                step_pages=prefill.page_buckets or spread(max(context, packed), _FEW_LISTED, 16),
            )
            if decode is not None and prefill.mixed_budget is not None:
                tokens = spread(prefill.mixed_budget, _FEW_MIXED, 4)
                buckets = replace(buckets, mixed_tokens=tokens)
        if decode is not None:
            _check_hold("decode.page_buckets", decode.page_buckets, context, max_model_len)
            few = max(4, _FEW_TOKENS // page_size)
            tables = decode.page_buckets or spread(context, few, 4)
            for width in (max_model_len, tables[-1]):
                _check_table("decode.rows", decode.rows, width, max_model_len)
            rows = decode.row_buckets or doubling(decode.rows // decode.stages)
            buckets = replace(buckets, table_pages=tables, tick_rows=rows)
        return buckets

    def tick_shapes(self, rows: int) -> dict[int, tuple[int, ...]]:
        """Every n that a tick may have, of microbatches of so many rows, and the W that it may have
        then. All rows take all of these. A table that is 16 times as wide as needed costs fewer of
        them 2%: they take every second W, from the widest down, and none that saves less."""
        few = self.table_pages[::-2][::-1]
        few = tuple(pages for pages in few if pages * self.page_size >= _WIDE or pages == few[-1])
        shapes = {size: few for size in self.tick_rows if size < rows}
        return shapes | {rows: self.table_pages}

    def pages_for(self, tokens: int) -> int:
        """Pages of the engine's pool that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    @property
    def most_mixed(self) -> int:
        """Most prompt tokens of a mixed step."""
        return self.mixed_tokens[-1] if self.mixed_tokens else 0

    def mixed_rows(self, rows: int) -> dict[int, tuple[int, ...]]:
        """The n of `tick_shapes` that the rows of a mixed step may have, and the W: few, since each
        is a program with each T, and the chunks take most of its time."""
        shapes = self.tick_shapes(rows)
        return {n: shapes[n][-1:] for n in list(shapes)[::-2][::-1]}

    def mixed_chunks(self) -> Iterator[tuple[int, int]]:
        """Every (T, Z) that the chunks of a mixed step may have."""
        return self._with_own_pages(self.mixed_tokens)

    def prefill_shapes(self) -> Iterator[tuple[int, int]]:
        """Every (T, Z) that a step may have."""
        return self._with_own_pages(self.tokens)

    def _with_own_pages(self, sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """Each of `sizes` with every Z: so many new tokens need at least their own pages."""
        for fewer, tokens in zip((0, *sizes), sizes, strict=False):
            for pages in self.step_pages:
                if pages * self.page_size > fewer:
                    yield tokens, pages


def doubling(rows: int) -> tuple[int, ...]:
    """1, 8, and doubling up to so many rows. Up to 8 rows a tick's time is that of the weights
    alone, but for one row's, whose products are of another kind. Fewer than 16 rows are not worth
    the compilations."""
    if rows < 2 * _FEW_ROWS:
        return (rows,)
    doubled = takewhile(lambda size: size < rows, (_FEW_ROWS << i for i in count()))
    return (1, *doubled, rows)


def _check_hold(name: str, buckets: tuple[int, ...] | None, pages: int, max_model_len: int) -> None:
    if buckets is not None and buckets[-1] < pages:
        raise ValueError(
            f"{name}={buckets}: the largest must hold the {pages} pages of "
            f"model.max_model_len={max_model_len}"
        )


def _check_table(name: str, rows: int, width: int, max_model_len: int) -> None:
    if rows * width > _MOST_ENTRIES:
        raise ValueError(
            f"{name}={rows}: must be at most {_MOST_ENTRIES // width} with "
            f"model.max_model_len={max_model_len}, since the host and the devices keep "
            f"tables of {width} numbers a row"
        )


def spread(largest: int, least: int, factor: int) -> tuple[int, ...]:
    """`largest`, and sizes a `factor` apart below it that are at least `least`."""
    sizes = [largest]
    while sizes[-1] // factor >= least:
        sizes.append(-(-sizes[-1] // factor))
    return tuple(reversed(sizes))


def fit(buckets: tuple[int, ...], size: int) -> int:
    """The smallest bucket that holds `size`."""
    place = bisect_left(buckets, size)
    assert place < len(buckets), f"no bucket of {buckets} holds {size}; a plan is too large"
    return buckets[place]


def padded(values: Seq[int] | np.ndarray, size: int, filler: int) -> np.ndarray:
    """`values` i32[size], padded with `filler`."""
    array = np.full(size, filler, np.int32)
    array[: len(values)] = values
    return array
