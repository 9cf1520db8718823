"""Spans: the runs of tokens that are whole pages in two pools, in which KV moves between them."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from pdjax.core.kv_layout import NULL_PAGE, KVLayout
from pdjax.host.batching.buckets import fit, padded

_CHEAP = 64 << 20
"""Bytes of padding that are cheaper than a compilation: a link of 100 GB/s takes under a
millisecond for them, and programs of a new size half a second to several seconds."""

_LEAST = 4
"""Spans of the smallest bucket, where the longest context has as many."""


@dataclass(frozen=True)
class Spans:
    """The spans between two pools.

    Attributes:
      tokens: of a span: a page of the pool with the larger pages.
      buckets: padded sizes of a transfer job in spans, ascending. A job pays for padding by the
        byte: they are a factor of two apart, and a factor of four where that is few bytes.
    """

    tokens: int
    buckets: tuple[int, ...]

    @classmethod
    def between(cls, source: KVLayout, target: KVLayout, max_model_len: int) -> "Spans":
        """Those of two pools, of which one page size divides the other."""
        tokens = source.span(target)
        span_bytes = tokens * max(each.page_bytes // each.page_size for each in (source, target))
        sizes = [-(-max_model_len // tokens)]
        while sizes[-1] >= 2 * _LEAST:
            factor = 4 if sizes[-1] * span_bytes <= _CHEAP else 2
            sizes.append(max(-(-sizes[-1] // factor), _LEAST))
        return cls(tokens, tuple(reversed(sizes)))

    def pages(self, holdings: Iterable[tuple[Seq[int], Seq[int]]], page_size: int) -> np.ndarray:
        """The pages of some spans of several sequences, one after another, padded with the null
        page to a bucket of spans: i32[n].

        Args:
          holdings: of each sequence its pages, in order, and which spans of it are meant.
          page_size: of the pool that the pages are of.
        """
        each = self.tokens // page_size  # pages of a span
        pages: list[int] = []
        for held, spans in holdings:
            if not held or each > 1:
                held = [*held, *[NULL_PAGE] * ((max(spans) + 1) * each - len(held))]
            if each == 1:
                pages += [held[span] for span in spans]
            else:
                pages += [page for span in spans for page in held[span * each : (span + 1) * each]]
        return padded(pages, fit(self.buckets, len(pages) // each) * each, NULL_PAGE)
