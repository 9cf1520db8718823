"""Batches of the checked steps: ragged, over scattered pages, with every kind of row that a bucket
may hold."""

import re
from dataclasses import dataclass, replace

import numpy as np

from experiments.common.sequences import behind, scattered_sequences
from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.chunks import Chunk
from pdjax.host.batching.decode_pipeline import DecodePipeline
from pdjax.host.batching.prefill_batch import prefill_batch
from pdjax.interfaces.batches import DecodeBatch, PrefillBatch
from pdjax.interfaces.steps import MixedStep

TICKS = 3
"""Ticks of a decode bucket: later ticks read the KV that earlier ones write."""

_SAMPLED = 32  # further tokens of a prefill step with compared logits, besides each chunk's last


@dataclass(frozen=True)
class Batches:
    """Steps of one bucket, to be run in order on a pool of `pages` pages."""

    name: str
    steps: tuple[PrefillBatch | DecodeBatch | MixedStep, ...]
    pages: int


def parse(text: str) -> tuple[int, int]:
    """Parse `64x8`: tokens or rows, and pages.

    Raises:
      ValueError: anything else.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ValueError(f"{text!r}: must be two sizes, such as 64x8")
    return int(found[1]), int(found[2])


def parse_mixed(text: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Parse `8x16/64x8`: the rows and pages of a decode bucket, the tokens and pages of one of
    prefill.

    Raises:
      ValueError: anything else.
    """
    rows, slash, chunks = text.partition("/")
    if not slash:
        raise ValueError(f"{text!r}: must be buckets of decode and of prefill, such as 8x16/64x8")
    return parse(rows), parse(chunks)


def prefill_batches(tokens: int, pages: int, page_size: int, vocab: int) -> Batches:
    """Make a bucket of prefill: a step with a chunk over earlier tokens, between whole prompts of
    several lengths, and the steps that write those earlier tokens.

    The earlier tokens take all remaining pages of the bucket. A fifth of the tokens, and one
    sequence, are padding. The step returns logits of tokens all over it.

    Raises:
      ValueError: the pages do not hold the tokens.
    """
    whole = [tokens // 3, 1, tokens // 5]
    chunk = tokens // 4
    left = pages - sum(-(-length // page_size) for length in whole)
    earlier = left * page_size - chunk - 3  # neither end of the chunk is at the end of a page
    if tokens < 16 or earlier < 1:
        raise ValueError(
            f"prefill={tokens}x{pages}: must be at least 16 tokens, and pages of {page_size} that "
            "hold as many and more"
        )
    one = (pages,)
    buckets = Buckets(page_size, pages * page_size, tokens, 5, (tokens,), one)
    long, *others = scattered_sequences([earlier + chunk, *whole], page_size, vocab, 0)
    chunks = [
        [Chunk(long, start, min(start + tokens, earlier))] for start in range(0, earlier, tokens)
    ]
    mixed = [Chunk(each, 0, each.length) for each in others]
    chunks.append([mixed[0], Chunk(long, earlier, earlier + chunk), *mixed[1:]])
    steps = (_sampled(prefill_batch(each, buckets)) for each in chunks)
    return Batches(f"prefill {tokens}x{pages}", tuple(steps), 1 + pages)


def _sampled(batch: PrefillBatch) -> PrefillBatch:
    """Add tokens all over the step to those that the batch returns logits of."""
    everywhere = np.linspace(0, batch.cu_q_lens[-1] - 1, _SAMPLED).astype(np.int32)
    return replace(batch, sample_at=np.concatenate([batch.sample_at, everywhere]))


def decode_batches(rows: int, width: int, page_size: int, vocab: int) -> Batches:
    """Make a bucket of decode: ticks of rows with contexts from two tokens to all that the table
    holds. One of several rows stays idle. Input tokens are random, not fed back.

    Raises:
      ValueError: the table is too short.
    """
    steps, pages = _ticks(rows, width, page_size, vocab, TICKS)
    return Batches(f"decode {rows}x{width}", tuple(steps), pages)


def mixed_batches(
    decode: tuple[int, int], prefill: tuple[int, int], page_size: int, vocab: int
) -> Batches:
    """Make a bucket of mixed steps: the steps of a bucket of prefill, each beside a tick of one of
    decode.

    Args:
      decode: rows, and pages of their table.
      prefill: tokens, and pages of a step.

    Raises:
      ValueError: see the two.
    """
    chunks = prefill_batches(*prefill, page_size, vocab)
    ticks, pages = _ticks(*decode, page_size, vocab, len(chunks.steps))
    steps = [
        MixedStep(behind(batch, pages - 1, page_size), tick)
        for batch, tick in zip(chunks.steps, ticks, strict=True)
        if isinstance(batch, PrefillBatch)
    ]
    name = "mixed {}x{}/{}x{}".format(*decode, *prefill)
    return Batches(name, tuple(steps), pages + chunks.pages - 1)


def _ticks(
    rows: int, width: int, page_size: int, vocab: int, count: int
) -> tuple[list[DecodeBatch], int]:
    """So many ticks, and the pages of their pool."""
    longest = width * page_size - count
    if longest < page_size:
        raise ValueError(f"decode={rows}x{width}: a table must hold more than {count} tokens more")
    buckets = Buckets(page_size, width * page_size, table_pages=(width,))
    pipeline = DecodePipeline(1, rows, buckets)
    lengths = np.linspace(longest, 1, max(1, rows - 1)).astype(int).tolist()
    if len(lengths) > 2:
        lengths[1] = page_size - 1  # this row reaches its second page in a later tick
    sequences = scattered_sequences(lengths, page_size, vocab, count)
    for sequence in sequences:
        sequence.output.append(0)  # as if prefill had chosen it
        pipeline.assign(pipeline.reserve(), sequence)
    rng = np.random.default_rng(1)
    steps = [
        replace(pipeline.tick().batch, tokens=rng.integers(0, vocab, rows).astype(np.int32))
        for _ in range(count)
    ]
    return steps, 1 + sum(len(sequence.pages) for sequence in sequences)
