import numpy as np

from pdjax.config import DecodeConfig, PrefillConfig
from pdjax.core.request import Request, SamplingParams
from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.decode_pipeline import DecodePipeline, Tick
from pdjax.host.sequences.constraint import Constraint
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.batches import IDLE_ROW, USE_FED_BACK

BUCKETS = Buckets.of(
    PrefillConfig(), DecodeConfig(page_buckets=(2, 8)), page_size=4, max_model_len=32
)


def assigned(pipeline: DecodePipeline, name: str, new_tokens: int = 9, **params) -> Sequence:
    """A sequence of prompt (1, 2, 3) and output [50], in the next free row."""
    request = Request(name, (1, 2, 3), SamplingParams(**params), 0.0)
    sequence = Sequence(request, 0, seed=5, max_new_tokens=new_tokens, output=[50], pages=[6])
    sequence.row = pipeline.reserve()
    pipeline.assign(sequence.row, sequence)
    return sequence


def leaving(tick: Tick) -> list[tuple[int, str]]:
    return [(row, ref.sequence.request.id) for row, ref in tick.leaving]


def test_one_stage_is_a_whole_step_a_tick():
    pipeline = DecodePipeline(1, 2, BUCKETS)
    sequence = assigned(pipeline, "a")
    first = pipeline.tick()
    assert first.batch.tokens.tolist() == [50, USE_FED_BACK]  # it joins with its newest token
    assert first.batch.positions.tolist() == [[3, IDLE_ROW]]
    assert first.batch.page_table.tolist() == [[[6, 0], [0, 0]]]
    assert leaving(first) == [(0, "a")]
    sequence.pages.append(4)
    second = pipeline.tick()
    assert second.batch.tick == 1
    assert second.batch.tokens.tolist() == [USE_FED_BACK, USE_FED_BACK]
    assert second.batch.positions.tolist() == [[4, IDLE_ROW]]
    assert second.batch.page_table.tolist() == [[[6, 4], [0, 0]]]


def test_microbatches_rotate():
    pipeline = DecodePipeline(3, 3, BUCKETS)
    for name in "abc":
        assigned(pipeline, name)
    ticks = [pipeline.tick() for _ in range(4)]
    # Row r is microbatch r: it enters at tick r, and leaves two ticks later.
    assert [tick.batch.positions[:, 0].tolist() for tick in ticks] == [
        [3, IDLE_ROW, IDLE_ROW],
        [3, 3, IDLE_ROW],
        [3, 3, 3],
        [4, 3, 3],
    ]
    assert [leaving(tick) for tick in ticks] == [[], [], [(0, "a")], [(0, "b")]]
    assert [tick.stages_active for tick in ticks] == [1, 2, 3, 3]
    assert [len(tick.refs) for tick in ticks] == [1, 2, 3, 3]


def test_a_released_row_is_idle_at_once_and_can_be_taken_again():
    pipeline = DecodePipeline(2, 2, BUCKETS)
    gone = assigned(pipeline, "gone", temperature=0.5)
    pipeline.tick()
    pipeline.release(gone.row)
    heir = assigned(pipeline, "heir")
    assert heir.row == gone.row
    tick = pipeline.tick()
    assert (tick.batch.positions == IDLE_ROW).all()  # the heir joins when its microbatch enters
    assert not tick.batch.page_table.any()
    assert not tick.batch.sampling.temperature.any()
    assert leaving(tick) == []
    assert pipeline.tick().batch.tokens.tolist() == [50]


def test_no_sequence_is_launched_beyond_its_last_token():
    pipeline = DecodePipeline(2, 2, BUCKETS)
    assigned(pipeline, "a", new_tokens=2)  # one is there, one is to come
    assert pipeline.active
    assert leaving(pipeline.tick()) == []
    assert pipeline.active  # on its way
    assert leaving(pipeline.tick()) == [(0, "a")]
    assert not pipeline.active


def test_an_empty_pipeline_is_not_active():
    pipeline = DecodePipeline(2, 4, BUCKETS)
    assert not pipeline.active
    pipeline.reserve()
    assert not pipeline.active
    assert pipeline.taken_rows == 1


def test_rows_are_spread_over_the_microbatches():
    pipeline = DecodePipeline(2, 6, BUCKETS)
    assert [pipeline.reserve() for _ in range(4)] == [0, 3, 1, 4]


def test_the_table_is_as_wide_as_needed():
    pipeline = DecodePipeline(1, 1, BUCKETS)
    sequence = assigned(pipeline, "a")
    assert pipeline.tick().batch.page_table.shape == (1, 1, 2)
    sequence.pages += [7, 8]
    assert pipeline.tick().batch.page_table.shape == (1, 1, 8)
    pipeline.release(0)
    assert pipeline.idle_tick(1, 2).page_table.shape == (1, 1, 2)


def test_arrays_are_fresh():
    pipeline = DecodePipeline(2, 2, BUCKETS)
    sequence = assigned(pipeline, "a", temperature=0.5)
    assigned(pipeline, "b")
    pipeline.tick()
    batch = pipeline.tick().batch
    arrays = [batch.tokens, batch.positions, batch.page_table, batch.sampling.temperature]
    before = [array.copy() for array in arrays]
    pipeline.release(sequence.row)
    pipeline.tick()
    assert all(np.array_equal(*pair) for pair in zip(before, arrays, strict=True))


def test_sequences_that_join_and_that_need_a_page():
    pipeline = DecodePipeline(2, 2, BUCKETS)
    sequence = assigned(pipeline, "a")
    assert pipeline.joining() == [sequence]
    assert pipeline.needing_page() == []  # position 3 is in its page
    pipeline.tick()
    assert pipeline.joining() == pipeline.needing_page() == []  # the other microbatch enters
    pipeline.tick()
    assert pipeline.joining() == []
    assert pipeline.needing_page() == [sequence]  # position 4 is not
    sequence.pages.append(5)
    assert pipeline.needing_page() == []
    assert pipeline.tick().batch.page_table[0].tolist() == [[6, 5]]


def test_what_has_not_changed_is_the_same_object():
    """An engine keeps what it has made of a sampling batch while it is handed the same one."""
    pipeline = DecodePipeline(2, 4, BUCKETS)
    first, other = assigned(pipeline, "a"), assigned(pipeline, "b")
    assert [sequence.row for sequence in (first, other)] == [0, 2]
    ticks = [pipeline.tick() for _ in range(4)]
    assert ticks[1].batch.sampling is ticks[3].batch.sampling  # microbatch 0 leaves
    assert ticks[1].leaving is ticks[3].leaving
    pipeline.release(other.row)
    heir = assigned(pipeline, "heir", temperature=0.5)
    assert heir.row == other.row
    later = [pipeline.tick() for _ in range(4)]
    assert later[1].batch.sampling is ticks[1].batch.sampling
    assert later[2].batch.sampling.temperature.tolist() == [0.5, 0]
    assert leaving(later[2]) == [(0, "heir")]


def masked(pipeline: DecodePipeline, name: str) -> Sequence:
    """A sequence whose row has a mask."""
    sequence = assigned(pipeline, "unmasked")
    pipeline.release(sequence.row)
    sequence.request = Request(name, (1, 2, 3), SamplingParams(allowed_token_ids=[0]), 0.0)
    sequence.constraint = Constraint(sequence.request.params, None, 32, [])
    sequence.row = pipeline.reserve()
    pipeline.assign(sequence.row, sequence)
    return sequence


def told(pipeline: DecodePipeline, sequence: Sequence, token: int) -> None:
    """The host has learned the newest token of a sequence."""
    sequence.output.append(token)
    pipeline.resume(sequence.row)


def test_a_row_with_a_mask_sits_out_until_its_token_is_known():
    pipeline = DecodePipeline(1, 2, BUCKETS)
    slow = masked(pipeline, "slow")
    assigned(pipeline, "fast")
    first, second, third = (pipeline.tick() for _ in range(3))
    assert [tick.batch.positions.tolist() for tick in (first, second, third)] == [
        [[3, 3]],
        [[4, IDLE_ROW]],
        [[5, IDLE_ROW]],
    ]
    assert first.batch.masks is not None and second.batch.masks is None
    assert (first.batch.masks.rows.tolist(), first.batch.masks.bits.tolist()) == ([0], [[1]])
    told(pipeline, slow, 60)
    tick = pipeline.tick()
    assert tick.batch.positions.tolist() == [[4, 6]]
    assert tick.batch.tokens.tolist() == [60, USE_FED_BACK]  # what the device kept is of no row
    pipeline.release(1 - slow.row)
    assert not pipeline.active  # nothing to do until the host knows more
    told(pipeline, slow, 61)
    assert pipeline.active


def test_a_mask_is_wanted_where_its_row_leaves():
    pipeline = DecodePipeline(3, 6, BUCKETS)
    slow = masked(pipeline, "slow")
    ticks = [pipeline.tick() for _ in range(3)]
    assert [tick.batch.masks is not None for tick in ticks] == [False, False, True]
    assert [len(tick.leaving) for tick in ticks] == [0, 0, 1]
    told(pipeline, slow, 60)
    pipeline.tick()
    pipeline.release(slow.row)  # in flight
    assert [pipeline.tick().batch.masks for _ in range(3)] == [None] * 3


def test_a_row_whose_mask_has_gone_runs_on():
    pipeline = DecodePipeline(1, 1, BUCKETS)
    sequence = masked(pipeline, "a")
    pipeline.tick()
    sequence.constraint = None
    told(pipeline, sequence, 60)
    ticks = [pipeline.tick().batch for _ in range(2)]
    assert [batch.tokens.tolist() for batch in ticks] == [[60], [USE_FED_BACK]]
    assert [batch.masks for batch in ticks] == [None, None]
