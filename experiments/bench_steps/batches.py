"""Batches of the timed steps: as the host makes them, without padding."""

from dataclasses import replace

from experiments.bench_steps.cases import DecodeCase, MixedCase, PrefillCase
from experiments.common.sequences import behind, scattered_sequences
from pdjax.host.batching.buckets import Buckets, doubling
from pdjax.host.batching.chunks import Chunk
from pdjax.host.batching.decode_pipeline import DecodePipeline
from pdjax.host.batching.prefill_batch import prefill_batch
from pdjax.interfaces.batches import DecodeBatch, PrefillBatch
from pdjax.interfaces.steps import MixedStep


def decode_batches(
    case: DecodeCase, steps: int, page_size: int, vocab: int
) -> tuple[list[DecodeBatch], int]:
    """Make consecutive greedy ticks of a one-stage engine; return them and the pages of their pool.

    Contexts grow by a token a tick and equal the case's in the middle.
    """
    # The first tick reads the prompt and the token that prefill chose.
    prompt = max(1, case.context - steps // 2 - 1)
    pages = -(-(prompt + steps) // page_size)
    buckets = _buckets(page_size, 1, pages, case.rows, prompt + steps)
    pipeline = DecodePipeline(1, case.of, replace(buckets, tick_rows=doubling(case.of)))
    for sequence in scattered_sequences([prompt] * case.rows, page_size, vocab, steps):
        sequence.output.append(1)
        pipeline.assign(pipeline.reserve(), sequence)
    return [pipeline.tick().batch for _ in range(steps)], 1 + case.rows * pages


def prefill_batches(
    case: PrefillCase, page_size: int, vocab: int
) -> tuple[list[PrefillBatch], int]:
    """Make steps of one shape; return them and the pages of their pool.

    The last step is the case's. Other steps, if any, are chunks that write the earlier tokens.

    Raises:
      ValueError: the earlier tokens are not a whole number of such chunks.
    """
    lengths = [length + earlier for length, earlier in case.chunks]
    pages = case.pages(page_size)
    buckets = _buckets(page_size, case.tokens, pages, len(lengths), max(lengths))
    sequences = scattered_sequences(lengths, page_size, vocab, 0)
    [(length, earlier), *_] = case.chunks
    if earlier % length:
        raise ValueError(f"{case.name}: earlier tokens must be a multiple of the chunk's length")
    steps = [
        prefill_batch([Chunk(sequences[0], start, start + length)], buckets)
        for start in range(0, earlier, length)
    ]
    last = [
        Chunk(sequence, earlier, earlier + length)
        for sequence, (length, earlier) in zip(sequences, case.chunks, strict=True)
    ]
    return [*steps, prefill_batch(last, buckets)], 1 + pages


def mixed_batches(
    case: MixedCase, steps: int, page_size: int, vocab: int
) -> tuple[list[MixedStep], list[PrefillBatch], int]:
    """Make consecutive ticks of a one-stage engine, each with the same chunks beside it.

    Returns:
      The steps; the prefill batches that write the earlier tokens of the chunks; the pages of the
      pool.
    """
    ticks, pages = decode_batches(case.rows, steps, page_size, vocab)
    batches, more = prefill_batches(case.chunks, page_size, vocab)
    *before, chunks = (behind(batch, pages - 1, page_size) for batch in batches)
    return [MixedStep(chunks, tick) for tick in ticks], before, pages + more - 1


def _buckets(page_size: int, tokens: int, pages: int, sequences: int, context: int) -> Buckets:
    """Make buckets with one size of each kind."""
    one = (pages,)
    return Buckets(page_size, context, tokens, sequences, (tokens,), one, one)
