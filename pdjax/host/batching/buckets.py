"""The padded sizes of batches.

A jitted step is compiled once for each shape it meets, so every batch is padded to one of a few
buckets, all of which can be driven once before the first request. Padding and buckets exist only
in this folder."""

from bisect import bisect_left
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from pdjax.config import DecodeConfig, PrefillConfig
from pdjax.config.checks import MOST_TOKENS

_MOST_ENTRIES = 2**28
"""Numbers of a table with a row a sequence: 1 GB."""


@dataclass(frozen=True)
class Buckets:
    """The padded sizes that batches may have, ascending; the last of each holds whatever may come.

    Attributes:
      tokens: T of a prefill step.
      step_pages: Z of a prefill step.
      table_pages: W of a decode page table.
      handoff_spans: spans of a shipment, of `span` tokens.
      sequences: B of a prefill step.
      context: C of a history, tokens.
      page_size: S of the prefill pools.
      table_page_size: S of the decode pools; one of the two divides the other.
    """

    tokens: tuple[int, ...]
    step_pages: tuple[int, ...]
    table_pages: tuple[int, ...]
    handoff_spans: tuple[int, ...]
    sequences: int
    context: int
    page_size: int
    table_page_size: int

    @classmethod
    def of(
        cls,
        prefill: PrefillConfig,
        decode: DecodeConfig,
        page_size: int,
        max_model_len: int,
        table_page_size: int | None = None,
    ) -> "Buckets":
        """The configured buckets, or where there are none, few that waste little.

        Each bucket of a step is a compilation of the whole model, so those are a factor of four
        apart; a hand-off compiles in no time and pays for padding by the byte, so those are a
        factor of two apart.

        Raises:
          ValueError: configured buckets that cannot hold the longest context, or tables of so many
            rows that no host could hold them.
        """
        if max_model_len > MOST_TOKENS:
            raise ValueError(f"model.max_model_len={max_model_len}: must be at most {MOST_TOKENS}")
        table_page_size = table_page_size or page_size
        context, widest = -(-max_model_len // page_size), -(-max_model_len // table_page_size)
        # Enough that a full token budget fits even if every prompt's last page is nearly empty.
        packed = -(-prefill.token_budget // page_size) + prefill.max_sequences
        for name, buckets, pages in (
            ("prefill.page_buckets", prefill.page_buckets, context),
            ("decode.page_buckets", decode.page_buckets, widest),
        ):
            if buckets is not None and buckets[-1] < pages:
                raise ValueError(
                    f"{name}={buckets}: the largest must hold the {pages} pages of "
                    f"model.max_model_len={max_model_len}"
                )
        for name, rows, each in (
            ("prefill.max_sequences", prefill.max_sequences, max_model_len),
            ("decode.rows", decode.rows, max_model_len),
            ("decode.rows", decode.rows, (decode.page_buckets or (widest,))[-1]),
        ):
            if rows * each > _MOST_ENTRIES:
                raise ValueError(
                    f"{name}={rows}: must be at most {_MOST_ENTRIES // each} with "
                    f"model.max_model_len={max_model_len}, since the host and the devices keep "
                    f"tables of {each} numbers a row"
                )
        return cls(
            tokens=prefill.token_buckets or _spread(prefill.token_budget, 16, 4),
            step_pages=prefill.page_buckets or _spread(max(context, packed), 4, 4),
            table_pages=decode.page_buckets or _spread(widest, 4, 4),
            handoff_spans=_spread(min(context, widest), 4, 2),
            sequences=prefill.max_sequences,
            context=max_model_len,
            page_size=page_size,
            table_page_size=table_page_size,
        )

    @property
    def span(self) -> int:
        """Tokens of a span: of the larger page."""
        return max(self.page_size, self.table_page_size)

    def pages_for(self, tokens: int) -> int:
        """Pages of a prefill pool that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def table_pages_for(self, tokens: int) -> int:
        """Pages of a decode pool that hold `tokens` tokens."""
        return -(-tokens // self.table_page_size)

    def prefill_shapes(self) -> Iterator[tuple[int, int]]:
        """Every (T, Z) that a step may have: so many new tokens need at least their own pages."""
        for fewer, tokens in zip((0, *self.tokens), self.tokens, strict=False):
            for pages in self.step_pages:
                if pages * self.page_size > fewer:
                    yield tokens, pages


def _spread(largest: int, least: int, factor: int) -> tuple[int, ...]:
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


def padded(values: Seq[int], size: int, filler: int) -> np.ndarray:
    """`values` i32[size], padded with `filler`."""
    array = np.full(size, filler, np.int32)
    array[: len(values)] = values
    return array
