"""Sequences for batches that no coordinator makes."""

from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np

from pdjax.core.kv_layout import NULL_PAGE
from pdjax.core.request import Request, SamplingParams
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.batches import PrefillBatch


def scattered_sequences(
    lengths: Seq[int], page_size: int, vocab: int, new_tokens: int
) -> list[Sequence]:
    """Make greedy sequences with random prompts of these lengths, and pages for all their tokens,
    scattered over the pool.

    Args:
      lengths: tokens of the prompts.
      page_size: tokens a page.
      vocab: token ids are below it.
      new_tokens: tokens that each sequence generates beside the first.
    """
    rng = np.random.default_rng(0)
    counts = [-(-(length + new_tokens) // page_size) for length in lengths]
    order = (1 + rng.permutation(sum(counts))).tolist()
    made = []
    for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        prompt = tuple(rng.integers(1, vocab, length).tolist())
        request = Request(f"step-{number}", prompt, SamplingParams(temperature=0.0), 0.0)
        own, order = order[:count], order[count:]
        made.append(Sequence(request, 0, seed=0, max_new_tokens=new_tokens + 1, pages=own))
    return made


def behind(batch: PrefillBatch, pages: int, page_size: int) -> PrefillBatch:
    """The batch on pages behind so many others; its padding stays in the null page."""

    def moved(x: np.ndarray, entries: int) -> np.ndarray:
        """x, numbers of which a page has so many."""
        return np.where(x // entries == NULL_PAGE, x, x + pages * entries)

    return replace(
        batch,
        slot_mapping=moved(batch.slot_mapping, page_size),
        kv_pages=moved(batch.kv_pages, 1),
    )
