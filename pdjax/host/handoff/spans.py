"""The pages of spans of tokens, as a transfer takes them."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np

from pdjax.core.kv_layout import NULL_PAGE
from pdjax.host.batching.buckets import Buckets, fit, padded


def span_pages(
    holdings: Iterable[tuple[Seq[int], Seq[int]]], page_size: int, buckets: Buckets
) -> np.ndarray:
    """The pages of some spans of several sequences, one after another, padded with the null page to
    a bucket of spans: i32[n].

    Args:
      holdings: of each sequence its pages, in order, and which spans of it are meant.
      page_size: of the pool that the pages are of.
    """
    each = buckets.span // page_size  # pages of a span
    pages: list[int] = []
    for held, spans in holdings:
        for span in spans:
            own = held[span * each : (span + 1) * each]
            pages += [*own, *[NULL_PAGE] * (each - len(own))]
    return padded(pages, fit(buckets.handoff_spans, len(pages) // each) * each, NULL_PAGE)
