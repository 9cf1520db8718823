"""Chunks of sequences become the padded numpy arrays of a prefill step.

Padding tokens write to the null page, and padding rows are greedy and ask for nothing.
"""

from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np

from pdjax.core.kv_layout import NULL_PAGE
from pdjax.host.batching.buckets import Buckets, fit, padded
from pdjax.host.batching.chunks import Chunk
from pdjax.host.batching.sampling_rows import SamplingRows, masks_of
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.batches import PrefillBatch, SamplingBatch, ScoreBatch


def prefill_batch(
    chunks: Seq[Chunk], buckets: Buckets, sizes: tuple[int, ...] = ()
) -> PrefillBatch:
    """Pack `chunks` one after another and pad them; see `interfaces.PrefillBatch`.

    Args:
      sizes: T that the batch may have; those of a prefill step where none are given.
    """
    page_size, rows = buckets.page_size, buckets.sequences
    pages_of = [chunk.sequence.pages[: buckets.pages_for(chunk.stop)] for chunk in chunks]
    sampling, masks = SamplingRows(rows), dict[int, np.ndarray]()
    for b, chunk in enumerate(chunks):
        if chunk.last:
            sampling.fill(b, chunk.sequence)
            if (mask := chunk.sequence.mask) is not None:
                masks[b] = mask
    batch = empty_prefill_batch(
        buckets,
        fit(sizes or buckets.tokens, sum(chunk.tokens for chunk in chunks)),
        fit(buckets.step_pages, sum(map(len, pages_of))),
        sampling.take(),
        history=any(chunk.last and _needs_history(chunk.sequence) for chunk in chunks),
    )
    token, page = 0, 0
    for b, (chunk, pages) in enumerate(zip(chunks, pages_of, strict=True)):
        sequence = chunk.sequence
        packed = slice(token, token + chunk.tokens)
        token, page = packed.stop, page + len(pages)
        positions = np.arange(chunk.start, chunk.stop, dtype=np.int32)
        batch.tokens[packed] = sequence.tokens(chunk.start, chunk.stop)
        batch.positions[packed] = positions
        own_pages = np.array(pages, np.int32)
        batch.slot_mapping[packed] = (
            own_pages[positions // page_size] * page_size + positions % page_size
        )
        batch.kv_pages[page - len(pages) : page] = own_pages
        batch.cu_q_lens[b + 1 :] = token
        batch.cu_pages[b + 1 :] = page
        batch.kv_lens[b] = chunk.stop
        batch.sample_at[b] = token - 1
        if chunk.last and batch.history is not None:
            batch.history[b, : sequence.length] = sequence.token_ids
    scored, masked = _scored(chunks), masks_of(masks)
    if scored is None and masked is None:
        return batch
    return replace(batch, scored=scored, masks=masked)


def _needs_history(sequence: Sequence) -> bool:
    params = sequence.request.params
    return params.penalized or bool(params.logit_bias) or sequence.mask is not None


def _scored(chunks: Seq[Chunk]) -> ScoreBatch | None:
    """The tokens of prompts whose log-probabilities the chunks bring, one chunk after another."""
    at, targets, first = list[int](), list[int](), 0
    for chunk in chunks:
        places = chunk.scored
        at += [first + place - 1 - chunk.start for place in places]
        targets += chunk.sequence.request.prompt_token_ids[places.start : places.stop]
        first += chunk.tokens
    if not targets:
        return None
    return ScoreBatch(np.array(at, np.int32), np.array(targets, np.int32))


def empty_prefill_batch(
    buckets: Buckets,
    tokens: int,
    step_pages: int,
    sampling: SamplingBatch | None = None,
    *,
    history: bool = False,
) -> PrefillBatch:
    """A step of that bucket in which everything is padding, but for how its rows are sampled."""
    rows = buckets.sequences
    return PrefillBatch(
        tokens=np.zeros(tokens, np.int32),
        positions=np.zeros(tokens, np.int32),
        slot_mapping=np.full(tokens, NULL_PAGE * buckets.page_size, np.int32),
        kv_pages=np.full(step_pages, NULL_PAGE, np.int32),
        cu_pages=np.zeros(rows + 1, np.int32),
        cu_q_lens=np.zeros(rows + 1, np.int32),
        kv_lens=np.zeros(rows, np.int32),
        sample_at=np.zeros(rows, np.int32),
        sampling=sampling or SamplingRows(rows).take(),
        history=np.zeros((rows, buckets.context), np.int32) if history else None,
    )


def history(token_ids: Seq[int], buckets: Buckets) -> np.ndarray:
    """`token_ids` i32[C], padded with zeros to the longest context."""
    return padded(token_ids, buckets.context, 0)
