"""A tick computes the rows that are active, in one of a few sizes."""

import numpy as np
import pytest

from pdjax.config import DecodeConfig
from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.decode_pipeline import DecodePipeline
from pdjax.interfaces.batches import IDLE_ROW, USE_FED_BACK
from tests.host.test_decode_pipeline import assigned, leaving, masked, told


def pipeline_of(stages: int, rows: int, *sizes: int) -> DecodePipeline:
    """Of tables 2 or 8 pages wide where all rows are computed, else 8."""
    decode = DecodeConfig(stages=stages, rows=rows, row_buckets=sizes, page_buckets=(2, 8))
    return DecodePipeline(stages, rows, Buckets.of(None, decode, 4, 32))


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (8, (8,)),
        (15, (15,)),
        (16, (1, 8, 16)),
        (64, (1, 8, 16, 32, 64)),
        (100, (1, 8, 16, 32, 64, 100)),
    ],
)
def test_default_sizes(rows, sizes):
    buckets = Buckets.of(None, DecodeConfig(rows=2 * rows, stages=2), 4, 32)
    assert tuple(buckets.tick_shapes(rows)) == sizes


def test_few_rows_have_fewer_widths():
    buckets = Buckets(64, 32768, table_pages=(8, 32, 128, 512), tick_rows=(1, 8))
    assert buckets.tick_shapes(16) == {1: (32, 512), 8: (32, 512), 16: (8, 32, 128, 512)}
    assert Buckets(64, 8192, table_pages=(8, 32, 128)).tick_shapes(4)[4] == (8, 32, 128)
    assert Buckets(64, 8192, table_pages=(8, 32, 128), tick_rows=(1,)).tick_shapes(4)[1] == (128,)
    assert Buckets(64, 8192, table_pages=(128,)).tick_shapes(4) == {4: (128,)}


def test_all_rows_are_a_size_whatever_is_configured():
    for sizes, expected in (((2,), (2, 6)), ((6,), (6,)), ((2, 6, 90), (2, 6)), ((90,), (6,))):
        assert {n for n, _ in pipeline_of(1, 6, *sizes).shapes()} == set(expected)


def test_a_tick_has_entries_for_active_rows_alone():
    pipeline = pipeline_of(1, 6, 1, 2, 4)
    sequences = [assigned(pipeline, name) for name in "abcde"]
    assert pipeline.tick().batch.rows.tolist() == [[0, 1, 2, 3, 4, 0]]
    for gone in (0, 2, 3):
        pipeline.release(sequences[gone].row)
    tick = pipeline.tick()
    assert tick.batch.rows.tolist() == [[1, 4]]  # nothing has moved: their KV, tokens and history
    assert tick.batch.positions.tolist() == [[4, 4]]
    assert tick.batch.tokens.tolist() == [USE_FED_BACK] * 2
    assert tick.batch.page_table.tolist() == [[[6, *[0] * 7]] * 2]
    assert tick.batch.leaving_places.tolist() == [1, 4]
    assert leaving(tick) == [(0, "b"), (1, "e")]
    joining = assigned(pipeline, "f")
    assert joining.row == 0
    tick = pipeline.tick()
    assert tick.batch.rows.tolist() == [[0, 1, 4, 0]]
    assert tick.batch.positions.tolist() == [[3, 5, 5, IDLE_ROW]]
    assert tick.batch.tokens.tolist() == [50, *[USE_FED_BACK] * 3]
    assert leaving(tick) == [(0, "f"), (1, "b"), (2, "e")]


def test_a_row_keeps_its_entry_from_stage_to_stage():
    pipeline = pipeline_of(2, 8, 1, 2)
    first, other, *rest = (assigned(pipeline, name) for name in "abcdef")
    assert [sequence.row for sequence in (first, other, *rest)] == [0, 4, 1, 5, 2, 6]
    assert pipeline.tick().batch.rows.tolist() == [[0, 1, 2, 0], [0] * 4]
    for sequence in (first, rest[0]):
        pipeline.release(sequence.row)
    tick = pipeline.tick()  # the last row of the first microbatch is where it was
    assert tick.batch.rows.tolist() == [[4, 5, 6, 0], [0, 1, 2, 0]]
    assert tick.batch.positions.tolist() == [[3, 3, 3, IDLE_ROW], [IDLE_ROW, IDLE_ROW, 3, IDLE_ROW]]
    assert not tick.batch.page_table[1, :2].any()
    assert leaving(tick) == [(2, "e")]
    tick = pipeline.tick()  # it enters alone, and is as large as the other, which is under way
    assert tick.batch.rows[0].tolist() == [2, 0, 0, 0]
    for sequence in (other, rest[1], rest[3]):
        pipeline.release(sequence.row)
    pipeline.tick()
    assert pipeline.tick().batch.rows.tolist() == [[2], [0]]


def test_sizes_of_ticks_that_warm_up():
    pipeline = pipeline_of(2, 8, 1, 2)
    assert list(pipeline.shapes()) == [(1, 8), (2, 8), (4, 2), (4, 8)]
    for n, pages in pipeline.shapes():
        batch = pipeline.idle_tick(n, pages)
        assert batch.page_table.shape == (2, n, pages)
        assert batch.rows.shape == batch.positions.shape == (2, n)
        assert (batch.tokens.shape, len(batch.sampling.seed)) == ((n,), 4)


def test_masks_name_entries():
    pipeline = pipeline_of(1, 4, 1, 2)
    gone, slow = assigned(pipeline, "gone"), masked(pipeline, "slow")
    assert slow.row == 1
    pipeline.release(gone.row)
    tick = pipeline.tick()
    assert tick.batch.rows.tolist() == [[1]]
    assert tick.batch.masks is not None and tick.batch.masks.rows.tolist() == [0]
    assert not pipeline.active
    told(pipeline, slow, 60)
    assert pipeline.tick().batch.tokens.tolist() == [60]


def test_a_sequence_that_takes_a_row_still_in_flight_does_not_get_its_entry():
    pipeline = pipeline_of(2, 4, 1)
    gone = assigned(pipeline, "gone")
    pipeline.tick()
    pipeline.release(gone.row)
    heir = assigned(pipeline, "heir")
    assert heir.row == gone.row
    pipeline.release(heir.row)
    tick = pipeline.tick()
    assert (tick.batch.positions == IDLE_ROW).all() and not tick.leaving
    assert np.array_equal(tick.batch.page_table, np.zeros((2, 1, 8), np.int32))
