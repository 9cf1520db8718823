"""Hand-offs in situations made by hand; `tests/property` makes all the others."""

from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import HandoffConfig, KVConfig
from pdjax.host.handoff.handoff import Handoff
from pdjax.host.policies.api import DecodeView
from pdjax.host.policies.handoff import HandoffRules
from pdjax.host.sequences.sequence import State
from pdjax.interfaces.transfer import Side
from tests.host.test_coordinator import CONFIG, Deployment, deploy, expected

pytestmark = pytest.mark.smoke

PAGE_BYTES = 4 * 4 * 2 * 4
"""Layers, tokens, K and V, bytes of an element."""


def deployed(
    *, prefix_cache: bool = False, stages: tuple[int, ...] = (1,), groups: int = 1, **handoff: Any
) -> Deployment:
    config = replace(
        CONFIG, handoff=HandoffConfig(**handoff), kv=KVConfig(prefix_cache=prefix_cache)
    )
    return deploy(config, stages=stages, groups=groups)


def sent(house: Deployment) -> list[tuple[int, int, int]]:
    """First layer, last layer and pages of each shipment."""
    return [(s.layers.start, s.layers.stop, s.pages) for s in house.transfer.shipments]


def test_kv_leaves_by_chunk_and_layer_group_while_it_is_computed():
    house = deployed(groups=2)
    sequence = house.submit("a", prompt_len=19)  # chunks of 8, 8 and 3 tokens; pages of 4
    house.run_until(lambda: bool(sequence.output))
    assert sent(house) == [(0, 2, 2), (2, 4, 2)] * 2 + [(0, 2, 1), (2, 4, 1)]
    house.run()
    assert sequence.output == expected(sequence)
    metrics = house.recorder.request(sequence)
    assert (metrics.transfer.shipments, metrics.transfer.transfers) == (6, 1)
    assert metrics.transfer.pages == 10


def test_in_bulk_it_leaves_when_the_prefill_has_ended():
    house = deployed(groups=2, streaming=False)
    sequence = house.submit("a", prompt_len=19)
    house.run_until(lambda: bool(sequence.output))
    house.run()
    assert sent(house) == [(0, 4, 5)]
    assert sequence.output == expected(sequence)


def test_what_can_leave_does_not_wait_for_the_next_step(monkeypatch):
    house = deployed(streaming=False)
    engine, left = house.prefill[0], []
    prefill = engine.prefill

    def step(*args):
        left.append(len(house.transfer.shipments))
        return prefill(*args)

    monkeypatch.setattr(engine, "prefill", step)
    for name in "ab":
        house.submit(name, prompt_len=8)  # a step each
    house.run()
    assert left == [0, 1]


def test_room_that_is_not_free_ahead_is_found_afterwards():
    house = deployed()
    long = [house.submit(name, max_tokens=20) for name in "ab"]  # both rows
    house.run_until(lambda: all(sequence.state is State.DECODING for sequence in long))
    third = house.submit("c", prompt_len=17)
    house.run_until(lambda: third.state is State.PREFILLED)
    assert third.handoff is None
    house.run()
    assert third.output == expected(third)


def test_a_lease_ends_and_room_is_free_again():
    house = deployed(lease=2.0)
    sequence = house.submit("a", prompt_len=20)
    house.coordinator.step()
    assert sequence.handoff is not None
    house.clock.advance(3.0)
    house.coordinator.step()
    assert sequence.handoff is None
    house.run()
    assert sequence.output == expected(sequence)


def test_no_more_is_on_the_way_than_allowed():
    house = deployed(max_bytes_in_flight=2 * PAGE_BYTES)  # the smallest shipment has five
    house.transfer._chance.max_delay = 3
    shipping, most = house.coordinator._handoffs._shipping, 0
    sequences = [house.submit(name, prompt_len=6) for name in "abcd"]
    while house.coordinator.has_work:
        house.coordinator.step()
        most = max(most, shipping.bytes_in_flight)
    assert most == 5 * PAGE_BYTES
    assert [sequence.output for sequence in sequences] == [expected(each) for each in sequences]


def test_shipments_keep_within_the_bound_and_nobody_overtakes():
    config = replace(
        CONFIG,
        prefill=replace(CONFIG.prefill, token_budget=40, max_sequences=8),
        decode=replace(CONFIG.decode, rows=8),
        handoff=HandoffConfig(streaming=False, max_bytes_in_flight=9 * PAGE_BYTES),
        max_waiting=20,
    )
    house = deploy(config, max_delay=3)
    shipping, most = house.coordinator._handoffs._shipping, 0
    large = house.submit("large", prompt_len=24)
    small = [house.submit(f"small {n}", prompt_len=3) for n in range(12)]
    while house.coordinator.has_work:
        house.coordinator.step()
        most = max(most, shipping.bytes_in_flight)
    assert most == 5 * PAGE_BYTES
    landed = [
        (moment, metrics.id)
        for metrics in house.recorder.requests()
        for name, moment in metrics.marks
        if name == "transfer_landed"
    ]
    assert "large#0" in [name for _, name in sorted(landed)[:5]]
    assert [each.output for each in (large, *small)] == [expected(each) for each in (large, *small)]


def test_what_nobody_wants_takes_its_room_until_it_has_come():
    house = deployed(streaming=False)
    sequence = house.submit("a")
    house.transfer._chance.max_delay = 50
    house.run_until(lambda: sequence.state is State.TRANSFERRING)
    shipping = house.coordinator._handoffs._shipping
    before = shipping.bytes_in_flight
    house.coordinator.abort("a")
    assert shipping.bytes_in_flight == before > 0
    assert not house.coordinator._handoffs.busy


def test_tokens_are_told_of_between_layer_groups():
    house = deployed(groups=4)
    early = house.submit("early", max_tokens=20)
    house.run_until(lambda: len(early.output) > 2)
    told: list[int] = []
    house.coordinator.on_news = lambda news: told.extend(each.stop for each in news)
    house.submit("late", prompt_len=8)
    returned = house.coordinator.step()
    assert told == sorted(set(told)) != []
    assert all(progress.start >= told[-1] for progress in returned if progress.sequence is early)
    house.run()
    assert early.output == expected(early)


def test_only_what_is_missing_moves():
    house = deployed(prefix_cache=True)
    first = house.submit("a", prompt_len=17)
    house.run()
    second = house.submit("b", prompt_len=18)
    house.run()
    assert [first.output, second.output] == [expected(first), expected(second)]
    assert second.cached_tokens == 16  # the prefill side had four pages of it
    assert house.transfer.pages_moved == 5 + 1  # and so had the decode side
    assert house.recorder.request(second).transfer.pages_skipped == 4


def test_tokens_may_be_made_on_the_prefill_side_first():
    house = deployed(after_tokens=3)
    sequence = house.submit("a", prompt_len=6, max_tokens=8)
    house.run()
    assert sequence.output == expected(sequence)
    assert house.recorder.engines["prefill/0"].steps == 4
    assert house.recorder.engines["decode/0"].steps == 4
    assert sent(house) == [(0, 4, 3)]  # six tokens of the prompt and three more


def test_short_prompts_never_move():
    house = deployed(stay_below=6)
    short, long = house.submit("a", prompt_len=5), house.submit("b", prompt_len=6)
    house.run()
    assert [short.output, long.output] == [expected(short), expected(long)]
    assert house.transfer.pages_moved == 2
    [moved] = house.transfer.shipments
    assert moved.source.side is Side.PREFILL


def test_an_answer_goes_back_and_the_next_turn_uses_it():
    house = deployed(prefix_cache=True, give_back=True)
    first = house.submit("a", prompt_len=8, max_tokens=9)
    house.run()
    assert [s.source.side for s in house.transfer.shipments] == [Side.PREFILL, Side.DECODE]
    assert house.transfer.shipments[-1].pages == 2  # of four, two are there already
    turn = replace(first.request, id="b", prompt_token_ids=(*first.token_ids, 5))
    [second] = house.coordinator.submit(turn)
    house.run()
    assert second.output == expected(second)
    assert second.cached_tokens == 16


def test_a_sequence_moves_to_an_engine_that_has_more_room():
    house = deployed(stages=(1, 2), rebalance=True)
    every = [house.submit(name, prompt_len=5, max_tokens=30) for name in "abcd"]
    house.run_until(lambda: all(sequence.state is State.DECODING for sequence in every))
    for sequence in every:
        if sequence.engine == 1:
            house.coordinator.abort(sequence.request.id)
    house.run()
    sides = [(s.source.side, s.source.engine, s.target.engine) for s in house.transfer.shipments]
    assert (Side.DECODE, 0, 1) in sides
    stayed = [sequence for sequence in every if sequence.state is State.FINISHED]
    assert len(stayed) == 2
    assert [sequence.output for sequence in stayed] == [expected(each) for each in stayed]
    assert all(sequence.epoch <= 1 for sequence in stayed)


def test_somebody_who_decodes_comes_before_somebody_who_will():
    house = deploy(CONFIG, pages=(40, 11))
    old = house.submit("old", prompt_len=15, max_tokens=20)
    house.run_until(lambda: old.state is State.DECODING)
    young = house.submit("young", prompt_len=17, max_tokens=3)
    house.run()
    assert old.epoch == 0
    assert [old.output, young.output] == [expected(old), expected(young)]


def test_pages_of_other_sizes():
    for size in (2, 8):
        house = deploy(CONFIG, table_page_size=size, groups=2)
        sequences = [house.submit(f"{n}", prompt_len=n) for n in (1, 7, 8, 17)]
        house.run()
        assert [each.output for each in sequences] == [expected(each) for each in sequences]


def test_a_hand_off_with_parts_missing_cannot_be_completed():
    house = deployed(streaming=False)
    sequence = house.submit("a")
    house.run_until(lambda: sequence.state is State.TRANSFERRING)
    handoff: Handoff = sequence.handoff
    assert not handoff.leave_if_complete() and not handoff.closed


def view(engine: int, free_rows: int, free_pages: int = 20) -> DecodeView:
    return DecodeView(engine, 4, free_rows, free_pages, 20, frozenset())


@pytest.mark.parametrize(
    ("engines", "goes_to"),
    [
        ([view(0, 0), view(1, 2)], 1),
        ([view(0, 1), view(1, 2)], None),  # it would only turn round
        ([view(0, 0), view(1, 2, free_pages=2)], None),
        ([view(0, 0)], None),
    ],
)
def test_who_migrates(engines, goes_to):
    house = deployed()
    buckets = house.coordinator.buckets
    sequences = [house.submit(name, prompt_len=size) for name, size in (("a", 9), ("b", 5))]
    rules = HandoffRules(HandoffConfig(rebalance=True), buckets)
    plan = rules.migrations(engines, {0: sequences, 1: []})
    assert [(each.sequence, each.engine) for each in plan] == (
        [] if goes_to is None else [(sequences[1], goes_to)]
    )


@pytest.mark.parametrize("rules", [{"stay_below": 100}, {"after_tokens": 30}])
def test_nobody_who_stays_stands_still(rules):
    """Two places of a step for four that decode where they were prefilled: each has its turn."""
    house = deployed(**rules)
    every = [house.submit(name, prompt_len=4, max_tokens=15) for name in "abcd"]
    house.run_until(lambda: all(len(sequence.output) >= 2 for sequence in every))
    while not any(sequence.done for sequence in every):
        before = [len(sequence.output) for sequence in every]
        for _ in range(3):
            house.coordinator.step()
        after = [len(sequence.output) for sequence in every]
        assert all(now > then for now, then in zip(after, before, strict=True)), (before, after)
    house.run()
    assert [sequence.output for sequence in every] == [expected(sequence) for sequence in every]
