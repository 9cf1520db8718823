"""The coordinator in situations made by hand; `tests/property` makes all the others."""

from dataclasses import replace

import numpy as np
import pytest

from pdjax.config import HandoffConfig, RolesConfig
from pdjax.core.kv_layout import k_and_v
from pdjax.core.request import QueueFull, Request
from pdjax.host.handoff.spans import Spans
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.interfaces.steps import StepKind
from tests.helpers.deployment import (
    CONFIG,
    LAYOUT,
    MAX_MODEL_LEN,
    assemble,
    deploy,
    expected,
    most_in_flight,
)
from tests.helpers.fake_engines import FakeDecodeEngine, FakePrefillEngine
from tests.helpers.fakes import Chance, InjectedError

pytestmark = pytest.mark.smoke


def test_the_path_of_one_request():
    deployment = deploy(stages=(2,))
    sequence = deployment.submit("a", prompt_len=20, max_tokens=6)
    deployment.run()
    assert sequence.output == expected(sequence)
    assert (sequence.state, sequence.finish_reason) == (State.FINISHED, "length")
    [metrics] = deployment.recorder.requests()
    assert [name for name, _ in metrics.marks] == [
        "arrived",
        "prefill_started",
        "reserved",
        "sent",
        "first_token",
        "prefilled",
        "transfer_started",
        "transfer_landed",
        "decoding",
        "first_tick",
        "finished",
    ]
    assert metrics.output_tokens == 6
    assert deployment.recorder.engines["prefill/0"].steps == 3  # 20 tokens, 8 at a time
    assert deployment.recorder.engines["prefill/0"].sums["tokens"] == 20
    decode = deployment.recorder.engines["decode/0"]
    assert decode.steps == decode.sums["rows_active"] == 5 * 2  # five tokens, two stages each
    assert decode.occupancy == decode.bubble_share == 0.5
    assert deployment.transport.pages_moved == 5


def test_a_first_token_that_is_the_last_is_never_transferred():
    deployment = deploy()
    single = deployment.submit("a", max_tokens=1)
    deployment.run()
    assert single.output == expected(single)
    assert deployment.transport.pages_moved == 0
    deployment.submit("b", max_tokens=2)
    deployment.run()
    assert deployment.transport.pages_moved == 1


def test_an_end_token_ends_and_is_reported():
    deployment = deploy()
    free = deployment.submit("free", max_tokens=30)
    deployment.run()
    token = next(t for i, t in enumerate(free.output) if t not in free.output[:i] and i >= 3)
    stopped = deployment.submit("stopped", max_tokens=30, stop_token_ids=[token])
    deployment.run()
    assert stopped.output == free.output[: free.output.index(token) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)


def test_progress_is_told_once():
    deployment = deploy(CONFIG, stages=(2, 1), max_delay=3)
    sequences = [deployment.submit(name) for name in "abc"]
    told: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
    ended = []
    while deployment.coordinator.has_work:
        for progress in deployment.coordinator.step():
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
    deployment = deploy(config, max_delay=9)
    for name in "abcd":
        deployment.submit(name, prompt_len=20, max_tokens=12)
    most = dict.fromkeys((StepKind.PREFILL, StepKind.DECODE), 0)
    while deployment.coordinator.has_work:
        deployment.coordinator.step()
        for kind in most:
            most[kind] = max(most[kind], most_in_flight(deployment, kind))
    assert set(most.values()) == {lookahead + 1}


def test_the_youngest_is_preempted_and_recomputed():
    # Nine pages of four tokens: both fit at first, but not to their ends.
    deployment = deploy(pages=(40, 10))
    old, young = (deployment.submit(name, prompt_len=12, max_tokens=12) for name in "ab")
    deployment.run()
    assert (old.epoch, young.epoch) == (0, 1)
    assert [old.output, young.output] == [expected(old), expected(young)]


def test_a_victim_stands_before_younger_sequences():
    deployment = deploy()
    old, young = deployment.submit("a"), deployment.submit("b")
    deployment.run_until(lambda: {old.state, young.state} == {State.DECODING})
    late = deployment.submit("c")
    for victim in (young, old):
        deployment.coordinator.loop.lifecycle.preempt(victim)
    assert deployment.coordinator.loop.lifecycle.waiting[:] == [old, young, late]
    deployment.run()
    assert [s.output for s in (old, young, late)] == [expected(s) for s in (old, young, late)]


@pytest.mark.parametrize("pages", [40, 10])
def test_colocated_moves_nothing(pages):
    deployment = deploy(pages=(pages, pages), colocated=True)
    sequences = [deployment.submit(name, prompt_len=12, max_tokens=12) for name in "abc"]
    deployment.run()
    assert [sequence.output for sequence in sequences] == [expected(s) for s in sequences]
    assert deployment.transport.pages_moved == 0
    assert max(sequence.epoch for sequence in sequences) == (pages == 10)


def test_a_broken_engine_takes_only_its_own_down(monkeypatch):
    config = replace(CONFIG, roles=RolesConfig(failures=None))  # else others do its work
    deployment = deploy(config, stages=(2, 1))

    def broken(step):
        raise RuntimeError("the mesh has gone")

    monkeypatch.setattr(deployment.decode[0], "submit", broken)
    sequences = [deployment.submit(name) for name in "abcd"]
    deployment.run()
    failed = [sequence for sequence in sequences if sequence.state is State.FAILED]
    assert 0 < len(failed) < 4
    for sequence in failed:
        assert sequence.error == "RuntimeError: the mesh has gone"
        assert sequence.finish_reason == "error"
    for sequence in set(sequences) - set(failed):
        assert sequence.output == expected(sequence)


def test_engine_spans_name_whom_they_served():
    deployment = deploy()
    for name in "ab":
        deployment.submit(name, max_tokens=2)
    deployment.run()
    spans = deployment.recorder.spans()
    assert {(s.name, s.who) for s in spans if s.who} == {("step", "a#0, b#0"), ("tick", "a#0, b#0")}
    assert "who" not in deployment.recorder.engines["decode/0"].sums


def test_text_that_breaks_fails_its_sequence_alone():
    class Text:
        text = ""

        def __init__(self, request: Request) -> None:
            self.breaks = request.id == "bad"
            self.pushed: list[int] = []
            self.finished = False

        def take(self) -> str:
            return ""

        def push(self, token_id: int) -> str | None:
            self.pushed.append(token_id)
            if self.breaks and len(self.pushed) == 3:
                raise InjectedError("no such character")
            return None

        def finish(self) -> None:
            self.finished = True

    deployment = deploy(make_text=Text)
    good, bad = deployment.submit("good"), deployment.submit("bad")
    deployment.run()
    assert isinstance(good.text, Text)
    assert good.output == good.text.pushed == expected(good)
    assert good.text.finished
    assert bad.error == "InjectedError: no such character"
    assert len(bad.output) == 3


def test_a_request_is_queued_with_all_its_choices_or_not_at_all():
    deployment = deploy()
    deployment.submit("a", n=3, temperature=1.0)
    assert deployment.coordinator.has_room(1)
    assert not deployment.coordinator.has_room(2)
    with pytest.raises(QueueFull, match="n=2 more do not fit into a queue of max_waiting=4"):
        deployment.submit("b", n=2, temperature=1.0)
    assert len(deployment.coordinator.loop.lifecycle.waiting) == 3
    deployment.run()
    assert deployment.coordinator.has_room(4)


def test_an_id_is_unique_while_it_is_live():
    deployment = deploy()
    deployment.submit("a")
    with pytest.raises(ValueError, match="id='a': in use"):
        deployment.submit("a")
    deployment.run()
    deployment.submit("a")


def test_what_can_never_fit_is_refused_at_the_door():
    deployment = deploy(pages=(40, 4))
    with pytest.raises(ValueError, match=r"decode pool holds 12 tokens.*max_tokens at most 8"):
        deployment.submit("a", prompt_len=5, max_tokens=9)
    endless = r"max_tokens=None \(to the end of the context\): .*up to 35 .*max_tokens at most 8"
    with pytest.raises(ValueError, match=endless):
        deployment.submit("a", prompt_len=5, max_tokens=None)
    request = deployment.submit("b", prompt_len=5, max_tokens=8).request
    deployment.coordinator.check_request(request)
    with pytest.raises(ValueError, match="prompt_token_ids"):
        deployment.coordinator.check_request(replace(request, prompt_token_ids=()))


def test_abort_is_told_and_leaves_nothing_behind():
    in_bulk = replace(CONFIG, handoff=HandoffConfig(streaming=False))
    deployment = deploy(in_bulk, max_delay=20)
    assert not deployment.coordinator.abort("nobody")
    sequence = deployment.submit("a")
    deployment.run_until(lambda: sequence.state is State.TRANSFERRING)
    assert deployment.coordinator.abort("a")
    assert (sequence.state, sequence.finish_reason) == (State.ABORTED, "abort")
    [progress] = deployment.coordinator.step()
    assert progress.finished
    assert progress.token_ids == []
    # What is on its way is not written.
    for pool in deployment.coordinator.loop.fleet.pools.values():
        assert pool.allocator.used_pages == 0
    deployment.run()
    late = deployment.submit("late")
    deployment.run()
    assert late.output == expected(late)


def test_a_step_with_nothing_to_do_lets_time_pass():
    deployment = deploy()
    deployment.coordinator.step()  # looks at engines that it has not seen yet
    assert deployment.clock.now() == 0
    for seconds in (1, 2):
        deployment.coordinator.step()
        assert deployment.clock.now() == seconds
    deployment.submit("a")
    deployment.coordinator.step()
    assert deployment.clock.now() == 2


def test_warm_up_drives_every_bucket():
    deployment = deploy(stages=(2, 1))
    [prefill], decode = deployment.prefill, deployment.decode
    shapes = set(deployment.state(prefill).buckets.prefill_shapes())
    ticks = {engine: set(deployment.state(engine).rows.shapes()) for engine in decode}
    jobs = len(Spans.between(LAYOUT, LAYOUT, MAX_MODEL_LEN).buckets)
    count = deployment.coordinator.warm_up()
    # Of prefill a step with a history, too; of decode a history and a token that is fed; of each
    # link a measurement.
    assert count == len(shapes) + 1 + sum(len(ticks[engine]) + 1 + jobs + 2 for engine in decode)
    assert prefill.shapes == shapes
    assert all(engine.shapes == ticks[engine] for engine in decode)
    for engine in (prefill, *decode):
        assert not engine.pages.contents[:, LAYOUT.page_size :].any()
    assert not deployment.transport.under_way
    sequence = deployment.submit("a", prompt_len=20, max_tokens=20, repetition_penalty=1.5)
    deployment.run()
    assert sequence.output == expected(sequence)


def test_caches_of_other_heads_are_refused():
    chance = Chance(0)
    prefill = FakePrefillEngine(LAYOUT, 9, chance)
    decode = FakeDecodeEngine(replace(LAYOUT, planes=(k_and_v(2, 1),) * 4), 9, 2, chance)
    with pytest.raises(ValueError, match="planes of layer 0"):
        assemble([prefill, decode], chance)


def test_the_history_of_penalized_sequences_is_set_when_they_join(monkeypatch):
    deployment = deploy(stages=(2,))
    calls: list[tuple[int, list[int]]] = []
    set_history = deployment.decode[0].set_history

    def spy(row: int, token_ids: np.ndarray) -> None:
        calls.append((row, token_ids.tolist()))
        set_history(row, token_ids)

    monkeypatch.setattr(deployment.decode[0], "set_history", spy)
    plain, penalized = deployment.submit("a"), deployment.submit("b", presence_penalty=0.5)
    deployment.run()
    [(row, history)] = calls
    assert row == 1
    assert history == [1, 2, 3, penalized.output[0]] + [0] * 36
    assert [plain.output, penalized.output] == [expected(plain), expected(penalized)]
