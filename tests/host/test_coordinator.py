"""The coordinator in situations made by hand; `tests/property` makes all the others."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from pdjax.config import Config, DecodeConfig, HandoffConfig, PrefillConfig
from pdjax.core.clock import VirtualClock
from pdjax.core.kv_layout import KVLayout, k_and_v, split_groups
from pdjax.core.request import QueueFull, Request, SamplingParams
from pdjax.host.coordinator import Coordinator
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.trace import trace_events
from pdjax.host.sequences.sequence import Sequence, State
from tests.helpers.fake_transfer import FakeTransfer
from tests.helpers.fakes import (
    END_TOKEN,
    VOCAB,
    Chance,
    FakeDecodeEngine,
    FakePrefillEngine,
    InjectedError,
    expected_output,
)

pytestmark = pytest.mark.smoke

LAYOUT = KVLayout.of_heads(
    num_layers=4, kv_heads=1, head_dim=1, page_size=4, dtype="float32", itemsize=4
)
CONFIG = Config(
    prefill=PrefillConfig(token_budget=8, max_sequences=2, lookahead=0),
    decode=DecodeConfig(rows=2, lookahead=0),
    max_waiting=4,
)


@dataclass
class Deployment:
    """Fakes that are ready at once, and their coordinator."""

    coordinator: Coordinator
    prefill: list[FakePrefillEngine]
    decode: list[FakeDecodeEngine]
    transfer: FakeTransfer
    clock: VirtualClock
    recorder: Recorder

    def submit(self, name: str, prompt_len: int = 3, **params: Any) -> Sequence:
        values = {"temperature": 0.0, "max_tokens": 5, "ignore_eos": True, **params}
        prompt = tuple(1 + i % (VOCAB - 1) for i in range(prompt_len))
        request = Request(name, prompt, SamplingParams(**values), self.clock.now())
        return self.coordinator.submit(request)[0]

    def run(self) -> None:
        for _ in range(1000):
            if not self.coordinator.has_work:
                return
            self.coordinator.step()
            self.coordinator.check()
        raise AssertionError("no end in sight")

    def run_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(1000):
            if condition():
                return
            self.coordinator.step()
        raise AssertionError("it never came to that")


def deploy(
    config: Config = CONFIG,
    *,
    stages: tuple[int, ...] = (1,),
    pages: tuple[int, int] = (40, 40),
    colocated: bool = False,
    max_delay: int = 0,
    make_text: Callable[[Request], Any] | None = None,
    groups: int = 1,
    table_page_size: int = LAYOUT.page_size,
) -> Deployment:
    """One prefill engine, whose steps have so many layer groups, and decode engines of so many
    stages."""
    chance = Chance(0, max_delay=max_delay)
    layer_groups = split_groups(LAYOUT.num_layers, groups)
    prefill = [FakePrefillEngine(LAYOUT, pages[0], chance, layer_groups)]
    table = replace(LAYOUT, page_size=table_page_size)
    decode = [
        FakeDecodeEngine(replace(table, stages=n), pages[1], config.decode.rows, chance)
        for n in stages
    ]
    transfer = FakeTransfer(prefill, decode, chance, colocated=colocated)
    clock = VirtualClock()
    recorder = Recorder(clock)
    coordinator = Coordinator(
        config,
        vocab_size=VOCAB,
        max_model_len=40,
        end_token_ids=[END_TOKEN],
        prefill_engines=prefill,
        decode_engines=decode,
        transfer=transfer,
        clock=clock,
        recorder=recorder,
        make_text=make_text,
    )
    return Deployment(coordinator, prefill, decode, transfer, clock, recorder)


def expected(sequence: Sequence) -> list[int]:
    return expected_output(sequence, LAYOUT.num_layers)


def test_the_path_of_one_request():
    house = deploy(stages=(2,))
    sequence = house.submit("a", prompt_len=20, max_tokens=6)
    house.run()
    assert sequence.output == expected(sequence)
    assert (sequence.state, sequence.finish_reason) == (State.FINISHED, "length")
    [metrics] = house.recorder.requests()
    assert [name for name, _ in metrics.marks] == [
        "arrived",
        "admitted",
        "prefill_started",
        "first_token",
        "transfer_started",
        "transfer_landed",
        "decoding",
        "finished",
    ]
    assert metrics.output_tokens == 6
    assert house.recorder.engines["prefill/0"].steps == 3  # 20 tokens, 8 at a time
    assert house.recorder.engines["prefill/0"].sums["tokens"] == 20
    decode = house.recorder.engines["decode/0"]
    assert decode.steps == decode.sums["rows_active"] == 5 * 2  # five tokens, two stages each
    assert decode.occupancy == decode.bubble_share == 0.5
    assert house.transfer.pages_moved == 5


def test_a_first_token_that_is_the_last_is_never_transferred():
    house = deploy()
    single = house.submit("a", max_tokens=1)
    house.run()
    assert single.output == expected(single)
    assert house.transfer.pages_moved == 0
    house.submit("b", max_tokens=2)
    house.run()
    assert house.transfer.pages_moved == 1


def test_an_end_token_ends_and_is_reported():
    house = deploy()
    free = house.submit("free", max_tokens=30)
    house.run()
    token = next(t for i, t in enumerate(free.output) if t not in free.output[:i] and i >= 3)
    stopped = house.submit("stopped", max_tokens=30, stop_token_ids=[token])
    house.run()
    assert stopped.output == free.output[: free.output.index(token) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)


def test_progress_is_told_once():
    house = deploy(CONFIG, stages=(2, 1), max_delay=3)
    sequences = [house.submit(name) for name in "abc"]
    told: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
    ended = []
    while house.coordinator.has_work:
        for progress in house.coordinator.step():
            told[progress.sequence] += progress.token_ids
            ended += [progress.sequence] * progress.finished
    assert told == {sequence: expected(sequence) for sequence in sequences}
    assert sorted(ended, key=sequences.index) == sequences


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_lookahead_bounds_what_is_in_flight(lookahead):
    config = replace(
        CONFIG,
        prefill=replace(CONFIG.prefill, lookahead=lookahead),
        decode=replace(CONFIG.decode, lookahead=lookahead),
    )
    house = deploy(config, max_delay=9)
    for name in "abcd":
        house.submit(name, prompt_len=20, max_tokens=12)
    most = {"prefill": 0, "decode": 0}
    while house.coordinator.has_work:
        house.coordinator.step()
        for kind, lanes in (
            ("prefill", house.coordinator._prefill),
            ("decode", house.coordinator._decode),
        ):
            most[kind] = max(most[kind], *(len(lane.in_flight) for lane in lanes))
    assert most == {"prefill": lookahead + 1, "decode": lookahead + 1}


def test_the_youngest_is_preempted_and_recomputed():
    # Nine pages of four tokens: both fit at first, but not to their ends.
    house = deploy(pages=(40, 10))
    old, young = (house.submit(name, prompt_len=12, max_tokens=12) for name in "ab")
    house.run()
    assert (old.epoch, young.epoch) == (0, 1)
    assert [old.output, young.output] == [expected(old), expected(young)]


def test_a_victim_stands_before_those_who_came_later():
    house = deploy()
    old, young = house.submit("a"), house.submit("b")
    house.run_until(lambda: {old.state, young.state} == {State.DECODING})
    late = house.submit("c")
    for victim in (young, old):
        house.coordinator._roster.preempt(victim)
    assert house.coordinator._roster.waiting == [old, young, late]
    house.run()
    assert [s.output for s in (old, young, late)] == [expected(s) for s in (old, young, late)]


@pytest.mark.parametrize("pages", [40, 10])
def test_colocated_moves_nothing(pages):
    house = deploy(pages=(pages, pages), colocated=True)
    sequences = [house.submit(name, prompt_len=12, max_tokens=12) for name in "abc"]
    house.run()
    assert [sequence.output for sequence in sequences] == [expected(s) for s in sequences]
    assert house.transfer.pages_moved == 0
    assert max(sequence.epoch for sequence in sequences) == (pages == 10)


def test_a_broken_engine_takes_only_its_own_down(monkeypatch):
    house = deploy(stages=(2, 1))

    def broken(batch):
        raise RuntimeError("the mesh has gone")

    monkeypatch.setattr(house.decode[0], "tick", broken)
    sequences = [house.submit(name) for name in "abcd"]
    house.run()
    failed = [sequence for sequence in sequences if sequence.state is State.FAILED]
    assert 0 < len(failed) < 4
    for sequence in failed:
        assert sequence.error == "RuntimeError: the mesh has gone"
        assert sequence.finish_reason == "error"
    for sequence in set(sequences) - set(failed):
        assert sequence.output == expected(sequence)


def test_engine_spans_name_whom_they_served():
    house = deploy()
    for name in "ab":
        house.submit(name, max_tokens=2)
    house.run()
    spans = house.recorder.spans()
    assert {(s.name, s.who) for s in spans if s.who} == {("step", "a#0, b#0"), ("tick", "a#0, b#0")}
    slices = [event for event in trace_events([], spans) if event["name"] == "tick"]
    assert [event["args"]["who"] for event in slices] == ["a#0, b#0"]
    assert "who" not in house.recorder.engines["decode/0"].sums


def test_text_that_breaks_fails_its_sequence_alone():
    class Text:
        def __init__(self, request: Request) -> None:
            self.breaks = request.id == "bad"
            self.pushed: list[int] = []
            self.finished = False

        def push(self, token_id: int) -> str | None:
            self.pushed.append(token_id)
            if self.breaks and len(self.pushed) == 3:
                raise InjectedError("no such character")
            return None

        def finish(self) -> None:
            self.finished = True

    house = deploy(make_text=Text)
    good, bad = house.submit("good"), house.submit("bad")
    house.run()
    assert good.output == good.text.pushed == expected(good)
    assert good.text.finished
    assert bad.error == "InjectedError: no such character"
    assert len(bad.output) == 3


def test_a_request_is_queued_with_all_its_choices_or_not_at_all():
    house = deploy()
    house.submit("a", n=3, temperature=1.0)
    assert house.coordinator.has_room(1)
    assert not house.coordinator.has_room(2)
    with pytest.raises(QueueFull, match="n=2 more do not fit into a queue of max_waiting=4"):
        house.submit("b", n=2, temperature=1.0)
    assert len(house.coordinator._roster.waiting) == 3
    house.run()
    assert house.coordinator.has_room(4)


def test_an_id_is_unique_while_it_is_live():
    house = deploy()
    house.submit("a")
    with pytest.raises(ValueError, match="id='a': in use"):
        house.submit("a")
    house.run()
    house.submit("a")


def test_what_can_never_fit_is_refused_at_the_door():
    house = deploy(pages=(40, 4))
    with pytest.raises(ValueError, match=r"decode pool holds 12 tokens.*max_tokens at most 8"):
        house.submit("a", prompt_len=5, max_tokens=9)
    endless = r"max_tokens=None \(to the end of the context\): .*up to 35 .*max_tokens at most 8"
    with pytest.raises(ValueError, match=endless):
        house.submit("a", prompt_len=5, max_tokens=None)
    request = house.submit("b", prompt_len=5, max_tokens=8).request
    house.coordinator.check_request(request)
    with pytest.raises(ValueError, match="prompt_token_ids"):
        house.coordinator.check_request(replace(request, prompt_token_ids=()))


def test_abort_is_told_and_leaves_nothing_behind():
    in_bulk = replace(CONFIG, handoff=HandoffConfig(streaming=False))
    house = deploy(in_bulk, max_delay=20)
    assert not house.coordinator.abort("nobody")
    sequence = house.submit("a")
    house.run_until(lambda: sequence.state is State.TRANSFERRING)
    assert house.coordinator.abort("a")
    assert (sequence.state, sequence.finish_reason) == (State.ABORTED, "abort")
    [progress] = house.coordinator.step()
    assert progress.finished
    assert progress.token_ids == []
    # Whatever is on its way lands nowhere.
    assert house.coordinator._prefill[0].allocator.used_pages == 0
    assert house.coordinator._decode[0].allocator.used_pages == 0
    house.run()
    late = house.submit("late")
    house.run()
    assert late.output == expected(late)


def test_a_step_that_changes_nothing_lets_time_pass():
    house = deploy()
    house.coordinator.step()
    assert house.clock.now() == 1
    house.submit("a")
    house.coordinator.step()
    assert house.clock.now() == 1


def test_warm_up_drives_every_bucket():
    house = deploy(stages=(2, 1))
    buckets = house.coordinator.buckets
    count = house.coordinator.warm_up()
    shapes = set(buckets.prefill_shapes())
    tables, handoffs = len(buckets.table_pages), len(buckets.handoff_spans)
    assert count == len(shapes) + 1 + 2 * (tables + 1 + handoffs + 1)
    assert house.prefill[0].shapes == shapes
    assert all(engine.widths == set(buckets.table_pages) for engine in house.decode)
    for pool in [house.prefill[0].pool, *(engine.pool for engine in house.decode)]:
        assert not pool.contents[:, LAYOUT.page_size :].any()
    sequence = house.submit("a", prompt_len=20, max_tokens=20, repetition_penalty=1.5)
    house.run()
    assert sequence.output == expected(sequence)


def test_caches_of_other_heads_are_refused():
    chance = Chance(0)
    prefill = [FakePrefillEngine(LAYOUT, 9, chance)]
    decode = [FakeDecodeEngine(replace(LAYOUT, planes=(k_and_v(2, 1),) * 4), 9, 2, chance)]
    with pytest.raises(ValueError, match="planes of layer 0"):
        Coordinator(
            CONFIG,
            vocab_size=VOCAB,
            max_model_len=40,
            end_token_ids=[],
            prefill_engines=prefill,
            decode_engines=decode,
            transfer=FakeTransfer(prefill, decode, chance),
            clock=VirtualClock(),
            recorder=Recorder(VirtualClock()),
        )


def test_penalized_sequences_are_remembered_when_they_join(monkeypatch):
    house = deploy(stages=(2,))
    calls: list[tuple[int, list[int]]] = []
    remember = house.decode[0].remember

    def spy(row: int, token_ids: np.ndarray) -> None:
        calls.append((row, token_ids.tolist()))
        remember(row, token_ids)

    monkeypatch.setattr(house.decode[0], "remember", spy)
    plain, penalized = house.submit("a"), house.submit("b", presence_penalty=0.5)
    house.run()
    [(row, history)] = calls
    assert row == 1
    assert history == [1, 2, 3, penalized.output[0]] + [0] * 36
    assert [plain.output, penalized.output] == [expected(plain), expected(penalized)]
