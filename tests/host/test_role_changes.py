"""Engines that change what they do, go out of service and come back, on fakes that are ready at
once; in tests/property at random."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import RolesConfig
from pdjax.core.ids import EngineId
from pdjax.core.roles import Role
from pdjax.host.metrics import trace
from pdjax.host.metrics.timeline import Timeline
from pdjax.host.metrics.trace import trace_events
from pdjax.host.roles import drains
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.host.service import Status
from tests.helpers.deployment import CONFIG, LAYOUT, Deployment, assemble, expected
from tests.helpers.fake_engines import FakeEngine, FakeMixedEngine
from tests.helpers.fakes import Chance, InjectedError

A, B, C = (EngineId(f"mixed/{i}") for i in range(3))
P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def deployed(*roles: Role, rows: int = 2, pages: int = 40, **config: Any) -> Deployment:
    """Engines that can do everything, each with a role and a pool of its own."""
    chance = Chance(0)
    engines: list[FakeEngine] = [
        FakeMixedEngine(LAYOUT, pages, rows, chance, name=f"mixed/{i}") for i, _ in enumerate(roles)
    ]
    named = {engine.id: role for engine, role in zip(engines, roles, strict=True)}
    decode = replace(CONFIG.decode, rows=rows)
    settings = replace(CONFIG, decode=decode, max_waiting=20, roles=RolesConfig(**config))
    return assemble(engines, chance, settings, roles=named)


def roles(deployment: Deployment) -> dict[EngineId, Role]:
    return {state.id: state.role for state in deployment.coordinator.loop.fleet}


def status(deployment: Deployment, engine: EngineId) -> Status:
    return deployment.coordinator.loop.fleet.engines[engine].service.status


def finished(deployment: Deployment, *sequences: Sequence) -> None:
    deployment.run()
    assert [each.output for each in sequences] == [expected(each) for each in sequences]


def broken(monkeypatch: pytest.MonkeyPatch, deployment: Deployment, name: EngineId) -> list[int]:
    """From now on every step of an engine fails; counts them."""
    [engine] = [each for each in deployment.decode if each.id == name]
    tried = [0]

    def fail(step: Any) -> Any:
        tried[0] += 1
        raise InjectedError("the device has failed")

    monkeypatch.setattr(engine, "submit", fail)
    return tried


def test_an_engine_ends_its_prompts_before_it_decodes():
    deployment = deployed(P, P, D)
    first = [deployment.submit(name, prompt_len=20) for name in "ab"]
    deployment.run_until(lambda: all(each.state is State.PREFILLING for each in first))
    assert {each.engine for each in first} == {A, B}
    deployment.coordinator.set_role(B, D)
    assert status(deployment, B) is Status.DRAINING
    later = [deployment.submit(name, prompt_len=8, max_tokens=12) for name in "cdef"]
    deployment.run_until(lambda: status(deployment, B) is Status.SERVING)
    assert roles(deployment) == {A: P, B: D, C: D}
    finished(deployment, *first, *later)
    assert {each.home for each in later} == {A}
    assert not sum(each.epoch for each in (*first, *later)), "nothing was computed twice"
    assert any(span.track == B and span.name == "tick" for span in deployment.recorder.spans())
    assert deployment.recorder.duties[B].role_changes == 1
    [duty] = deployment.recorder.all_duties()
    assert (duty.engine, duty.name, duty.cause) == (B, "draining to be decode", "asked for")
    events = list(trace_events(Timeline.of(deployment.recorder)))
    [shown] = [event for event in events if event["name"] == duty.name]
    assert (shown["pid"], shown["args"]) == (trace.DUTIES, {"cause": "asked for"})


def test_sequences_that_decode_move_to_another_engine():
    deployment = deployed(P, D, D, rows=3)
    sequences = [deployment.submit(name, max_tokens=20) for name in "ab"]
    deployment.run_until(lambda: all(each.state is State.DECODING for each in sequences))
    left = next(each for each in sequences if each.engine == B)
    outputs = len(left.output)
    deployment.coordinator.set_role(B, P)
    deployment.run_until(lambda: roles(deployment)[B] is P)
    assert left.engine in (C, None) and len(left.output) < 20 and outputs < 20
    finished(deployment, *sequences)
    assert any(
        (job.source, job.target) == ("hbm/mixed-1", "hbm/mixed-2")
        for job in deployment.transport.jobs
    )
    assert all("preempted" not in dict(m.marks) for m in deployment.recorder.requests())


def test_what_has_no_room_elsewhere_ends_where_it_is():
    deployment = deployed(P, D, D, rows=1, drain_deadline=None)
    sequences = [deployment.submit(name, max_tokens=20) for name in "ab"]
    deployment.run_until(lambda: all(each.state is State.DECODING for each in sequences))
    deployment.coordinator.set_role(C, P)
    finished(deployment, *sequences)
    assert roles(deployment)[C] is P
    assert not any(job.source == "hbm/mixed-2" for job in deployment.transport.jobs)


def test_what_is_left_at_the_deadline_starts_over():
    deployment = deployed(P, D, D, rows=1, drain_deadline=0.5)
    sequences = [deployment.submit(name, max_tokens=20) for name in "ab"]
    deployment.run_until(lambda: all(each.state is State.DECODING for each in sequences))
    [left] = [each for each in sequences if each.engine == C]
    deployment.coordinator.set_role(C, P)
    deployment.coordinator.step()
    assert status(deployment, C) is Status.DRAINING
    deployment.clock.advance_to(deployment.clock.now() + 1)
    deployment.run_until(lambda: roles(deployment)[C] is P)
    assert 0 < len(left.output) < 20
    finished(deployment, *sequences)
    preempted = [m.id for m in deployment.recorder.requests() if "preempted" in dict(m.marks)]
    assert preempted == [left.id]


def test_more_is_done_at_once_and_less_when_drained():
    deployment = deployed(P, D)
    deployment.coordinator.set_role(A, M)
    assert roles(deployment) == {A: M, B: D} and status(deployment, A) is Status.SERVING
    sequence = deployment.submit("a", max_tokens=8)
    deployment.run_until(lambda: sequence.state is State.DECODING)
    assert sequence.engine == A  # where its KV is
    deployment.coordinator.set_role(A, P)
    assert status(deployment, A) is Status.DRAINING
    finished(deployment, sequence)
    assert roles(deployment) == {A: P, B: D}


def test_a_change_that_is_under_way_is_taken_back():
    deployment = deployed(P, D, D, rows=1)
    sequences = [deployment.submit(name, max_tokens=20) for name in "ab"]
    deployment.run_until(lambda: all(each.state is State.DECODING for each in sequences))
    deployment.coordinator.set_role(C, None)
    assert status(deployment, C) is Status.DRAINING
    deployment.coordinator.set_role(C, D)
    assert status(deployment, C) is Status.SERVING
    finished(deployment, *sequences)
    assert all("preempted" not in dict(m.marks) for m in deployment.recorder.requests())


@pytest.mark.parametrize(
    ("engine", "role", "message"),
    [
        (A, D, "mixed/0 to role decode: no other engine in service would prefill requests of 40"),
        (A, None, "mixed/0 out of service: no other engine in service would prefill"),
        (B, P, "no other engine in service would decode requests of 40 tokens; let another one"),
        (EngineId("x"), P, "engine=x: must be one of mixed/0, mixed/1"),
    ],
)
def test_the_last_engine_of_a_kind_stays(engine: EngineId, role: Role | None, message: str):
    deployment = deployed(P, D)
    with pytest.raises(ValueError, match=message):
        deployment.coordinator.set_role(engine, role)
    assert roles(deployment) == {A: P, B: D}
    finished(deployment, deployment.submit("a"))


def test_an_engine_goes_out_of_service_and_comes_back():
    deployment = deployed(P, D, D)
    deployment.coordinator.set_role(B, None)
    assert status(deployment, B) is Status.OUT
    finished(deployment, *(deployment.submit(name) for name in "abc"))
    assert not any(span.track == B for span in deployment.recorder.spans())
    deployment.coordinator.set_role(B, D)
    assert status(deployment, B) is Status.SERVING
    finished(deployment, *(deployment.submit(name) for name in "defg"))
    assert any(span.track == B for span in deployment.recorder.spans())
    assert deployment.recorder.duties[B].outages == 1


def test_a_broken_turn_does_not_stop_a_drain(monkeypatch: pytest.MonkeyPatch):
    deployment = deployed(P, D, D)
    sequences = [deployment.submit(name, max_tokens=20) for name in "ab"]
    deployment.run_until(lambda: all(each.state is State.DECODING for each in sequences))
    monkeypatch.setattr(drains.Drains, "_migrate", lambda self, state: 1 / 0)
    deployment.coordinator.set_role(B, P)
    with pytest.raises(ZeroDivisionError):
        deployment.run_until(lambda: False)
    monkeypatch.undo()
    finished(deployment, *sequences)
    assert roles(deployment) == {A: P, B: P, C: D}


@pytest.mark.parametrize("sick", [A, C])
def test_a_failed_engine_is_out_of_service_and_others_do_its_work(sick: EngineId, monkeypatch):
    deployment = deployed(P, P, D, D)
    tried = broken(monkeypatch, deployment, sick)
    sequences = [deployment.submit(f"r{i}", prompt_len=10) for i in range(8)]
    finished(deployment, *sequences)
    assert tried == [3] and status(deployment, sick) is Status.OUT
    service = deployment.coordinator.loop.fleet.engines[sick].service
    assert service.cause == "its steps failed, the last with InjectedError: the device has failed"


def test_a_failed_engine_is_tried_again_and_longer_put_aside(monkeypatch: pytest.MonkeyPatch):
    deployment = deployed(P, P, D, retry_after=500.0)
    tried = broken(monkeypatch, deployment, A)
    clock, lengths = deployment.clock, list[float]()
    for i in range(3):
        finished(deployment, *(deployment.submit(f"{i}-{j}", prompt_len=10) for j in range(4)))
        outage = deployment.coordinator.loop.fleet.engines[A].service.outage
        assert outage is not None
        lengths.append(outage.until - outage.since)
        clock.advance_to(outage.until)
    assert lengths == [500.0, 1000.0, 2000.0]
    assert tried == [5]  # once each further time
    monkeypatch.undo()
    finished(deployment, *(deployment.submit(f"z{j}", prompt_len=10) for j in range(4)))
    assert status(deployment, A) is Status.SERVING


def poisoned(monkeypatch: pytest.MonkeyPatch, deployment: Deployment) -> None:
    """From now on a prefill step fails on any engine in which a prompt has a 6."""
    for engine in deployment.decode:
        submit = engine.submit

        def picky(step: Any, submit: Callable[[Any], Any] = submit) -> Any:
            if step.kind.value == "prefill" and 6 in step.batch.tokens:
                raise InjectedError("poison")
            return submit(step)

        monkeypatch.setattr(engine, "submit", picky)


@pytest.mark.parametrize("shape", [(P, P, P, D), (P, P, D), (P, D), (M, M), (M,)])
def test_sequences_that_break_every_step_harm_nobody_else(shape: tuple[Role, ...], monkeypatch):
    deployment = deployed(*shape, rows=4, pages=100)
    poisoned(monkeypatch, deployment)
    [long] = [deployment.submit("long", prompt=(3, 4), max_tokens=30)]
    deployment.run_until(lambda: long.state is State.DECODING)
    for i in range(4):
        bad = deployment.submit(f"bad{i}", prompt=(6, 1))
        deployment.run_until(lambda bad=bad: bad.done)  # type: ignore[misc]
        assert (bad.state, bad.error) == (State.FAILED, "InjectedError: poison")
    finished(deployment, long, deployment.submit("good", prompt=(3, 4)))
    served = [each for each in deployment.coordinator.loop.fleet if not each.service.outage]
    assert any(each.service.widest is M for each in served)


def test_neighbours_of_a_sequence_that_breaks_every_step_go_on_without_it(monkeypatch):
    deployment = deployed(P, P, D, rows=4, pages=100)
    poisoned(monkeypatch, deployment)
    near = [deployment.submit(f"g{i}", prompt=(3, 4), max_tokens=4) for i in range(2)]
    bad, *far = (deployment.submit(name, prompt=(t, 1)) for name, t in (("bad", 6), ("g2", 3)))
    deployment.run()
    assert (bad.state, bad.error) == (State.FAILED, "InjectedError: poison")
    finished(deployment, *near, *far)


def sized(*engines: tuple[Role, int]) -> Deployment:
    """Engines that can do everything, with pools of so many pages."""
    chance = Chance(0)
    made: list[FakeEngine] = [
        FakeMixedEngine(LAYOUT, pages, 2, chance, name=f"mixed/{i}")
        for i, (_, pages) in enumerate(engines)
    ]
    named = {engine.id: role for engine, (role, _) in zip(made, engines, strict=True)}
    settings = replace(CONFIG, max_waiting=20, roles=RolesConfig(retry_after=500.0))
    return assemble(made, chance, settings, roles=named)


@pytest.mark.parametrize("engines", [((P, 40), (P, 6), (D, 40)), ((D, 40), (D, 6), (P, 40))])
def test_who_stands_in_has_room_for_the_longest(engines, monkeypatch: pytest.MonkeyPatch):
    deployment = sized(*engines)
    broken(monkeypatch, deployment, A)
    long = [deployment.submit(f"long{i}", prompt_len=26) for i in range(3)]
    short = [deployment.submit(f"short{i}") for i in range(3)]
    finished(deployment, *long, *short)
    assert status(deployment, A) is Status.OUT and roles(deployment)[C] is M


def test_the_longest_fail_where_nobody_has_room_and_the_others_go_on(monkeypatch):
    deployment = sized((M, 40), (M, 6))
    broken(monkeypatch, deployment, A)
    long = [deployment.submit(f"long{i}", prompt_len=26) for i in range(12)]
    deployment.run()
    assert {each.state for each in long} == {State.FAILED} and status(deployment, A) is Status.OUT
    assert "NoHealthyEngine: no engine in service would" in str(long[-1].error)
    late = deployment.submit("late", prompt_len=26)
    finished(deployment, *(deployment.submit(f"short{i}") for i in range(3)))
    assert late.state is State.FAILED


def test_an_engine_stands_in_and_goes_back(monkeypatch: pytest.MonkeyPatch):
    deployment = deployed(P, D, retry_after=500.0)
    broken(monkeypatch, deployment, B)
    finished(deployment, *(deployment.submit(name) for name in "abc"))
    assert status(deployment, B) is Status.OUT and roles(deployment)[A] is M
    monkeypatch.undo()
    deployment.clock.advance_to(deployment.clock.now() + 500)
    finished(deployment, *(deployment.submit(name) for name in "def"))
    assert status(deployment, B) is Status.SERVING and roles(deployment) == {A: P, B: D}


def test_requests_fail_at_once_where_no_engine_is_healthy(monkeypatch: pytest.MonkeyPatch):
    deployment = deployed(M, failures=2)
    tried = broken(monkeypatch, deployment, A)
    sequences = [deployment.submit(f"r{i}", prompt_len=10) for i in range(12)]
    deployment.run()
    assert {each.state for each in sequences} == {State.FAILED}
    assert tried == [8]  # it has no substitute, and is given up late
    cause = "mixed/0: its steps failed, the last with InjectedError: the device has failed"
    assert sequences[0].error == "InjectedError: the device has failed"
    assert str(sequences[-1].error).startswith("NoHealthyEngine: no engine in service would")
    assert str(sequences[-1].error).endswith(cause)
    late = deployment.submit("late")
    deployment.run()
    assert late.state is State.FAILED and tried == [8]


def test_without_a_bound_engines_stay_in_service(monkeypatch: pytest.MonkeyPatch):
    deployment = deployed(P, P, D, failures=None)
    broken(monkeypatch, deployment, A)
    sequences = [deployment.submit(f"r{i}", prompt_len=10) for i in range(8)]
    deployment.run()
    assert {each.state for each in sequences} == {State.FAILED, State.FINISHED}
    assert status(deployment, A) is Status.SERVING


def test_a_loss_of_the_mesh_with_steps_in_flight_counts_once():
    deployment = deployed(P, P, D)
    health, state = deployment.coordinator.loop._health, deployment.state(deployment.decode[0])
    deployment.clock.advance_to(1.0)
    for started in (0.5, 0.7, 0.9):
        health.failed(state, InjectedError("lost"), started)
    assert state.service.failures == 1
    for _ in range(8):
        health.worked(state)
    assert state.service.failures == 0.5


def test_an_engine_that_comes_back_is_measured_anew():
    deployment = deployed(M, M)
    finished(deployment, *(deployment.submit(name) for name in "abcdef"))
    state = deployment.coordinator.loop.fleet.engines[A]

    def known() -> list[bool]:
        kinds = state.prefill_times, state.token_times, state.tick_times, state.chunk_times
        return [times.measured for times in kinds]

    assert sum(known()) > 2
    deployment.coordinator.set_role(A, None)
    deployment.coordinator.step()
    assert status(deployment, A) is Status.OUT
    deployment.coordinator.set_role(A, M)
    assert not any(known())
