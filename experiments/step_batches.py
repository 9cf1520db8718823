"""What goes through the door in a timed step: batches as the host makes them, padded to nothing."""

from collections.abc import Iterator

import numpy as np

from experiments.step_cases import DecodeCase, PrefillCase
from pdjax.core.request import Request, SamplingParams
from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.chunks import Chunk
from pdjax.host.batching.decode_pipeline import Pipeline
from pdjax.host.batching.prefill_batch import prefill_batch
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.batches import DecodeBatch, PrefillBatch


def decode_batches(
    case: DecodeCase, steps: int, page_size: int, vocab: int
) -> tuple[list[DecodeBatch], int]:
    """Greedy ticks of a one-stage engine that follow one another, and the pages of their pool.

    Contexts grow by a token a tick, and are those of the case in the middle.
    """
    # The prompt, and the token that prefill chose: what the first tick reads.
    prompt = max(1, case.context - steps // 2 - 1)
    pages = -(-(prompt + steps) // page_size)
    buckets = _buckets(page_size, 1, pages, case.rows, prompt + steps)
    pipeline = Pipeline(1, case.rows, buckets)
    for sequence in _sequences([prompt] * case.rows, page_size, vocab, steps):
        sequence.output.append(1)
        pipeline.seat(pipeline.reserve(), sequence)
    return [pipeline.tick().batch for _ in range(steps)], 1 + case.rows * pages


def prefill_batches(
    case: PrefillCase, page_size: int, vocab: int
) -> tuple[list[PrefillBatch], int]:
    """Steps of one shape, of which the last is the case's, and the pages of their pool.

    The others, if any, are chunks that write the earlier tokens.

    Raises:
      ValueError: earlier tokens that are no whole number of such chunks.
    """
    lengths = [length + earlier for length, earlier in case.chunks]
    pages = case.pages(page_size)
    buckets = _buckets(page_size, case.tokens, pages, len(lengths), max(lengths))
    sequences = list(_sequences(lengths, page_size, vocab, 0))
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


def _buckets(page_size: int, tokens: int, pages: int, sequences: int, context: int) -> Buckets:
    """One of each."""
    one = (pages,)
    return Buckets((tokens,), one, one, one, sequences, context, page_size, page_size)


def _sequences(
    lengths: list[int], page_size: int, vocab: int, new_tokens: int
) -> Iterator[Sequence]:
    """Greedy ones with prompts of these lengths, and pages for all that they may come to hold,
    scattered over the pool."""
    rng = np.random.default_rng(0)
    counts = [-(-(length + new_tokens) // page_size) for length in lengths]
    order = (1 + rng.permutation(sum(counts))).tolist()
    for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        prompt = tuple(rng.integers(1, vocab, length).tolist())
        request = Request(f"step-{number}", prompt, SamplingParams(temperature=0.0), 0.0)
        own, order = order[:count], order[count:]
        yield Sequence(request, choice=0, seed=0, max_new_tokens=new_tokens + 1, pages=own)
