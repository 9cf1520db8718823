"""Sequences for batches that no coordinator makes."""

from collections.abc import Sequence as Seq

import numpy as np

from pdjax.core.request import Request, SamplingParams
from pdjax.host.sequences.sequence import Sequence


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
