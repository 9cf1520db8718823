"""Events in, plans out: what a turn looks at; lost engines, timers, pauses, and what wakes."""

import operator
from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import Config, HandoffConfig
from pdjax.core.ids import EngineId
from pdjax.core.request import Request, SamplingParams
from pdjax.host import fleet as fleet_module
from pdjax.host.engines import view_of
from pdjax.host.policies.api import AskAgain
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.policies.registry import make_policies
from pdjax.host.runners.decode import DecodeRunner
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.interfaces.events import EngineLost
from pdjax.sim.cluster import Cluster
from pdjax.workloads.arrival import Arrival
from tests.helpers.deployment import CONFIG, LAYOUT, assemble, deploy, expected
from tests.helpers.fake_engines import FakeBothEngine, FakeDecodeEngine, FakePrefillEngine
from tests.helpers.fakes import Chance

IN_BULK = replace(CONFIG, handoff=HandoffConfig(streaming=False))
WITHOUT_DEADLINE = replace(CONFIG, handoff=HandoffConfig(streaming=False, deadline=None))


def right(*sequences: Sequence) -> bool:
    return [each.output for each in sequences] == [expected(each) for each in sequences]


# Only what has been touched is looked at.


def test_a_turn_views_and_ticks_only_engines_that_something_has_happened_to(monkeypatch):
    engines, viewed, ticked = 50, list[str](), list[str]()
    deployment = deploy(replace(CONFIG, max_waiting=99), stages=(1,) * engines, prefills=engines)
    dispatch = DecodeRunner.dispatch

    def count_views(state, sharing):
        viewed.append(state.id)
        return view_of(state, sharing)

    def count_ticks(self, states):
        states = list(states)
        ticked.extend(state.id for state in states)
        return dispatch(self, states)

    monkeypatch.setattr(fleet_module, "view_of", count_views)
    monkeypatch.setattr(DecodeRunner, "dispatch", count_ticks)
    first = deployment.submit("first", max_tokens=30)
    deployment.run_until(lambda: first.state is State.DECODING)
    deployment.coordinator.step()
    viewed.clear()
    ticked.clear()
    for _ in range(10):
        deployment.coordinator.step()
    # One sequence decodes, and none waits: one engine ticks, and no policy is asked.
    assert set(ticked) == {first.engine}
    assert not viewed
    late = deployment.submit("late", max_tokens=30)
    deployment.run_until(lambda: late.state is State.DECODING)
    touched = {first.engine, late.engine, late.home, first.home}
    assert set(viewed) <= touched, "views are kept until something happens to an engine"
    assert set(ticked) <= touched
    deployment.run()
    assert right(first, late)


def test_a_view_is_the_same_object_until_something_happens_to_its_engine():
    deployment = deploy(stages=(1, 1))
    fleet = deployment.coordinator.loop.fleet
    before = fleet.views(fleet)
    assert all(map(operator.is_, fleet.views(fleet), before))
    sequence = deployment.submit("a", max_tokens=9)
    deployment.run_until(lambda: sequence.state is State.DECODING)
    after = {view.engine: view for view in fleet.views(fleet)}
    changed = {view.engine for view in before if after[view.engine] is not view}
    assert changed == {"prefill/0", sequence.engine}
    deployment.run()


# First tokens.


def test_a_first_token_is_told_before_more_is_dispatched():
    deployment = deploy()
    first, second = (deployment.submit(name, prompt_len=8, max_tokens=3) for name in "ab")
    step = deployment.coordinator.step
    news: list[Sequence] = []
    while first not in news:
        assert not first.output
        news = [progress.sequence for progress in step()]
    assert second.state is State.WAITING
    step()
    assert second.state is not State.WAITING
    deployment.run()
    assert right(first, second)


def test_a_turn_goes_on_after_the_last_sequence_has_ended_with_its_first_token():
    deployment = deploy()
    deployment.submit("a", max_tokens=1)
    deployment.run()
    loop = deployment.coordinator.loop
    assert not loop.has_work and not loop.fleet.touched


# Lost engines.


@pytest.mark.parametrize("how", ["noticed", "posted", "both"])
@pytest.mark.parametrize("engine", ["prefill", "decode"])
@pytest.mark.parametrize("state", [State.PREFILLING, State.TRANSFERRING, State.DECODING])
def test_a_loss_that_is_posted_leads_to_what_one_that_is_noticed_leads_to(how, engine, state):
    deployment = deploy(IN_BULK, max_delay=2)
    hit = deployment.submit("hit", prompt_len=10, max_tokens=9)
    deployment.run_until(lambda: hit.state is state)
    lost = deployment.prefill[0] if engine == "prefill" else deployment.decode[0]
    if state is State.DECODING and engine == "prefill":
        state = State.FINISHED  # nothing of it is there any more
    lost.pages.contents[:] = 0
    if how != "posted":
        lost.pages.losses += 1
    if how != "noticed":
        deployment.events.post(EngineLost(lost.id, losses=1))
    deployment.run()
    assert right(hit)
    concerned = {
        # A loss that is only counted is seen when the engine is next looked at: there is KV then.
        State.PREFILLING: engine == "prefill" or how == "noticed",
        State.TRANSFERRING: True,
        State.DECODING: engine == "decode",
        State.FINISHED: False,
    }
    assert hit.epoch == int(concerned[state])
    assert not deployment.transport.under_way


def test_a_lost_engine_costs_sequences_elsewhere_nothing():
    deployment = deploy(stages=(1, 1))
    asked = [deployment.submit(name, max_tokens=20) for name in "abcd"]
    deployment.run_until(lambda: all(each.state is State.DECODING for each in asked))
    deployment.events.post(EngineLost(EngineId("decode/1"), losses=1))
    on_it = {each for each in asked if each.engine == "decode/1"}
    deployment.run()
    assert right(*asked) and len(on_it) == 2
    assert {each for each in asked if each.epoch} == on_it


# Timers.


def test_a_lost_job_that_is_not_wanted_is_given_up():
    """Its room on the way is free again, after a minute where there is no deadline."""
    deployment = deploy(WITHOUT_DEADLINE)
    deployment.transport.loss_rate = 1.0
    gone = deployment.submit("gone")
    deployment.run_until(lambda: bool(deployment.transport.jobs))
    deployment.coordinator.abort(gone.request.id)
    queue = deployment.coordinator.loop.handoffs.queue
    assert queue.bytes_in_flight > 0 and deployment.transport.under_way
    deployment.clock.advance(30.0)
    deployment.coordinator.step()
    assert queue.bytes_in_flight > 0
    deployment.clock.advance(31.0)
    for _ in range(2):
        deployment.coordinator.step()
    assert queue.bytes_in_flight == 0
    assert not deployment.transport.under_way


def test_a_job_that_is_wanted_is_not_given_up_where_there_is_no_deadline():
    deployment = deploy(WITHOUT_DEADLINE)
    deployment.transport.loss_rate = 1.0
    waiting = deployment.submit("waiting")
    deployment.run_until(lambda: bool(deployment.transport.jobs))
    for _ in range(3):
        deployment.clock.advance(100.0)
        deployment.coordinator.step()
    assert waiting.state is State.TRANSFERRING
    assert list(deployment.transport.under_way) == [deployment.transport.jobs[0].id]


def test_a_deadline_is_kept_by_a_timer():
    """Nothing else happens: the clock jumps to it."""
    handoff = HandoffConfig(streaming=False, deadline=5.0, retries=1)
    deployment = deploy(replace(CONFIG, handoff=handoff))
    deployment.transport.loss_rate = 1.0
    sequence = deployment.submit("a")
    deployment.run_until(lambda: len(deployment.transport.jobs) == 1)
    sent = deployment.clock.now()
    deployment.run_until(lambda: len(deployment.transport.jobs) == 2)
    assert deployment.clock.now() == sent + 5
    deployment.transport.loss_rate = 0.0
    deployment.run()
    assert right(sequence) and deployment.recorder.transfers.retries == 2
    for _ in range(20):
        deployment.coordinator.step()
    assert not deployment.transport.under_way


class Gathering(FcfsPrefill):
    """Waits until the oldest prompt has waited half a second, and asks more often than it need."""

    def __init__(self, setup) -> None:
        super().__init__(setup)
        self.asked: list[float] = []

    def plan(self, waiting, engines, now):
        self.asked.append(now)
        due = waiting[0].request.arrival + 0.5 if waiting else now
        if due <= now:
            return super().plan(waiting, engines, now)
        return [AskAgain(due), AskAgain(due), AskAgain(due + 0.25)]


def test_a_policy_that_waits_for_a_moment_is_asked_then(caplog):
    policies = make_policies(Config(), {"prefill": Gathering})
    cluster = Cluster(Config(), policies=policies)
    cluster.expect([Arrival(moment, 8, 2) for moment in (1.0, 1.125, 3.0)])
    ended = cluster.run().requests
    waits = [each.ttft or 0.0 for each in ended]
    assert waits == pytest.approx([0.5, 0.375, 0.5], abs=0.1) and min(waits) > 0.375
    policy: Any = policies.prefill
    assert {1.0, 1.125, 1.5, 3.0, 3.5} <= set(policy.asked)
    assert "planned nothing" not in caplog.text


def test_starting_over_cancels_what_is_under_way(monkeypatch):
    deployment = deploy(IN_BULK, max_delay=30)
    hit = deployment.submit("hit")
    deployment.run_until(lambda: hit.state is State.TRANSFERRING)
    assert deployment.transport.under_way
    with monkeypatch.context() as patch:
        patch.setattr(deployment.events, "poll", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            deployment.coordinator.step()
    assert not deployment.transport.under_way
    assert hit.state is State.WAITING
    deployment.run()
    assert right(hit)


# Pauses, and what wakes.


def test_a_paused_engine_is_given_no_tick_until_it_is_resumed():
    deployment = deploy(stages=(1, 1))
    asked = [deployment.submit(name, max_tokens=20) for name in "abcd"]
    deployment.run_until(lambda: all(each.state is State.DECODING for each in asked))
    deployment.coordinator.pause(EngineId("decode/0"))
    deployment.coordinator.step()  # what is in flight comes back
    lengths = {each: len(each.output) for each in asked if each.engine == "decode/0"}
    assert len(lengths) == 2
    others = [each for each in asked if each not in lengths]
    deployment.run_until(lambda: all(each.done for each in others))
    assert {each: len(each.output) for each in lengths} == lengths
    deployment.coordinator.resume(EngineId("decode/0"))
    deployment.run()
    assert right(*asked)


def test_wake_ends_the_wait_of_a_step():
    deployment = deploy()
    deployment.coordinator.step()
    deployment.coordinator.step()
    assert deployment.clock.now() == 1  # waited
    deployment.coordinator.wake()
    deployment.coordinator.step()
    assert deployment.clock.now() == 1
    deployment.coordinator.step()
    assert deployment.clock.now() == 2


# Engines that accept both kinds, and pools that engines share.


def test_what_decodes_does_not_keep_a_prompt_from_an_engine_that_accepts_both():
    chance = Chance(0)
    deployment = assemble([FakeBothEngine(LAYOUT, 40, 2, chance)], chance)
    first = deployment.submit("first", max_tokens=30)
    deployment.run_until(lambda: len(first.output) == 3)
    late = deployment.submit("late", prompt_len=8)
    deployment.run_until(lambda: bool(late.output))
    assert len(first.output) < 8
    deployment.run()
    assert right(first, late)


def test_pages_that_leave_a_pool_are_seen_by_every_engine_of_it():
    chance = Chance(0, max_delay=3)
    first = FakePrefillEngine(LAYOUT, 40, chance, name="prefill/0")
    second = FakePrefillEngine(LAYOUT, 40, chance, name="prefill/1", pages=first.pages)
    decode = FakeDecodeEngine(LAYOUT, 40, 2, chance)
    deployment = assemble([first, second, decode], chance, IN_BULK)
    fleet = deployment.coordinator.loop.fleet
    sequence = deployment.submit("a")
    for _ in range(100):
        for state in fleet:
            assert fleet.views([state])[0].leaving_pages == state.pool.leaving
        if sequence.state is State.DECODING:
            break
        deployment.coordinator.step()
    deployment.run()
    assert right(sequence)


def test_another_thread_may_ask_whether_there_is_work():
    handoffs = deploy().coordinator.loop.handoffs

    class Closed:
        """A hand-off; while it is looked at, the thread that drives opens another."""

        @property
        def closed(self) -> bool:
            handoffs._open[2] = self  # type: ignore[assignment]
            return True

    opened = handoffs._open
    opened[1] = Closed()  # type: ignore[assignment]
    assert not handoffs.busy
    assert handoffs._open is opened and set(opened) == {1, 2}, "the new one would be lost"


# A sequence's tokens.


@pytest.mark.parametrize("start", range(7))
@pytest.mark.parametrize("stop", range(8))
def test_a_cut_of_a_sequences_tokens(start, stop):
    sequence = Sequence(Request("a", (1, 2, 3), SamplingParams(), 0.0), 0, 0, output=[4, 5, 6])
    assert sequence.tokens(start, stop) == sequence.token_ids[start:stop]
