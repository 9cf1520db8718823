"""Small steps for simulated engines."""

from collections.abc import Sequence

import numpy as np

from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.interfaces.batches import IDLE_ROW, DecodeBatch, PrefillBatch, SamplingBatch
from pdjax.interfaces.transport import TransferJob

LAYOUT = KVLayout.of_heads(4, 2, 8, page_size=16, dtype="float32", itemsize=4)
"""A page is 2 * 4 * 2 * 16 * 32 bytes = 8,192 bytes, 2,048 a layer."""


def sampling(seeds: Sequence[int]) -> SamplingBatch:
    rows = len(seeds)
    zeros, ints = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
    return SamplingBatch(
        temperature=zeros,
        top_k=ints,
        top_p=zeros + 1,
        min_p=zeros,
        presence_penalty=zeros,
        frequency_penalty=zeros,
        repetition_penalty=zeros + 1,
        seed=np.array(seeds, np.uint32),
        prompt_lens=ints,
        logprobs=np.zeros(rows, np.bool_),
    )


def prefill_batch(
    lengths: Sequence[int], seeds: Sequence[int] = (), before: Sequence[int] = ()
) -> PrefillBatch:
    """Chunks of so many tokens each, behind `before` tokens that have been computed already."""
    ends = np.cumsum([0, *lengths])
    stops = np.add(lengths, before or [0] * len(lengths))
    total = int(ends[-1])
    return PrefillBatch(
        tokens=np.ones(total, np.int32),
        positions=np.zeros(total, np.int32),
        slot_mapping=np.zeros(total, np.int32),
        kv_pages=np.zeros(0, np.int32),
        cu_pages=np.zeros(len(lengths) + 1, np.int32),
        cu_q_lens=ends.astype(np.int32),
        kv_lens=stops.astype(np.int32),
        sample_at=(ends[1:] - 1).astype(np.int32),
        sampling=sampling(seeds or range(len(lengths))),
        history=None,
    )


def decode_batch(positions: Sequence[Sequence[int]], seeds: Sequence[int] = ()) -> DecodeBatch:
    """A tick of rows at positions [R, b]; None of them is fed by the host."""
    stages = np.array(positions, np.int32)
    rows = stages.shape[1]
    return DecodeBatch(
        tick=0,
        tokens=np.full(rows, IDLE_ROW, np.int32),
        rows=np.broadcast_to(np.arange(rows, dtype=np.int32), stages.shape),
        positions=stages,
        page_table=np.zeros((*stages.shape, 1), np.int32),
        sampling=sampling(seeds or range(rows)),
    )


def job(
    number: int, source: PoolId, target: PoolId, pages: int, layers: range = range(4)
) -> TransferJob:
    """A transfer of pages 1 to `pages`."""
    return TransferJob(
        number, source, target, layers, np.arange(1, pages + 1, dtype=np.int32), pages
    )
