"""Mixed steps: chunks join the rows of an engine that takes both at once."""

from dataclasses import replace

import pytest

from pdjax.core.ids import EngineId
from pdjax.interfaces.steps import Step, StepKind
from tests.helpers.deployment import CONFIG, LAYOUT, Deployment, assemble, expected
from tests.helpers.fake_engines import FakeMixedEngine
from tests.helpers.fakes import Chance, FakeStepTicket, InjectedError

BUDGET = 4


def deployed(lookahead: int = 0, chance: Chance | None = None) -> Deployment:
    config = replace(
        CONFIG,
        prefill=replace(CONFIG.prefill, mixed_budget=BUDGET),
        decode=replace(CONFIG.decode, lookahead=lookahead, row_buckets=(1,)),
    )
    chance = chance or Chance(0)
    return assemble([FakeMixedEngine(LAYOUT, 40, 2, chance, name="mixed/0")], chance, config)


def mixing(deployment: Deployment) -> FakeMixedEngine:
    [engine] = deployment.decode
    assert isinstance(engine, FakeMixedEngine)
    return engine


def noted(deployment: Deployment) -> list[tuple[StepKind, int, int]]:
    """The steps that are submitted from now on: kind, tokens, sequences."""
    seen: list[tuple[StepKind, int, int]] = []
    observer = deployment.recorder.observer

    class Notes(type(observer)):  # type: ignore[misc]
        def step_submitted(
            self, engine: EngineId, kind: StepKind, tokens: int, sequences: int, now: float
        ) -> None:
            seen.append((kind, tokens, sequences))

    deployment.recorder.observer = Notes()
    return seen


def test_chunks_join_rows_up_to_the_budget():
    deployment = deployed()
    steps = noted(deployment)
    first = deployment.submit("a", prompt_len=8, max_tokens=12)
    deployment.run_until(lambda: len(first.output) == 2)
    long = deployment.submit("b", prompt_len=10, max_tokens=2)
    deployment.run()
    assert [first.output, long.output] == [expected(first), expected(long)]
    alone, tick = (StepKind.PREFILL, 8, 1), (StepKind.DECODE, 1, 1)
    mixed = [(StepKind.MIXED, tokens + 1, 2) for tokens in (4, 4, 2)]
    assert steps[:2] == [alone, tick]
    joined = steps.index(mixed[0])
    assert steps[joined : joined + 3] == mixed  # no step without the row, none over the budget
    assert set(steps[2:joined]) <= {tick}
    assert all(kind is StepKind.DECODE for kind, _, _ in steps[joined + 3 :])


def test_no_row_no_bound():
    deployment = deployed()
    steps = noted(deployment)
    deployment.submit("a", prompt_len=8, max_tokens=1)
    deployment.run()
    assert steps == [(StepKind.PREFILL, 8, 1)]


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_steps_of_all_kinds_in_flight_are_counted_together(lookahead):
    deployment = deployed(lookahead, Chance(0, max_delay=5))
    engine = mixing(deployment)
    for name in "abc":
        deployment.submit(name, prompt_len=12, max_tokens=12)
    most = 0
    while deployment.coordinator.has_work:
        deployment.coordinator.step()
        most = max(most, len(deployment.state(engine).in_flight))
    assert most == lookahead + 1
    assert engine.mixed  # the steps that were


def test_a_mixed_step_that_fails_ends_its_sequences_and_no_others(monkeypatch):
    deployment = deployed()
    engine = mixing(deployment)
    row = deployment.submit("a", prompt_len=4, max_tokens=12)
    deployment.run_until(lambda: len(row.output) == 2)
    chunk, later = (deployment.submit(name, prompt_len=6, max_tokens=3) for name in "bc")
    submit = engine.submit

    def fail_once(step: Step) -> FakeStepTicket:
        if step.kind is StepKind.MIXED:
            monkeypatch.undo()
            raise InjectedError("the device has failed")
        return submit(step)

    monkeypatch.setattr(engine, "submit", fail_once)
    deployment.run()
    ended = {seq.id: seq.state.value for seq in (row, chunk)}
    assert set(ended.values()) == {"failed"}, ended
    assert later.output == expected(later)


def test_the_two_halves_are_slices_of_a_trace_that_coincide():
    deployment = deployed()
    first = deployment.submit("a", prompt_len=8, max_tokens=12)
    deployment.run_until(lambda: len(first.output) == 2)
    deployment.submit("b", prompt_len=4, max_tokens=2)
    deployment.run()
    spans = deployment.recorder.spans()
    steps, ticks = ({(s.start, s.end) for s in spans if s.name == n} for n in ("step", "tick"))
    assert steps & ticks


def test_first_tokens_of_a_mixed_step_are_told_before_more_is_dispatched():
    deployment = deployed()
    steps = noted(deployment)
    row = deployment.submit("a", prompt_len=4, max_tokens=12)
    deployment.run_until(lambda: len(row.output) == 2)
    later = deployment.submit("b", prompt_len=4, max_tokens=5)
    while not later.output:
        before = len(steps)
        deployment.coordinator.step()
    assert steps[before - 1] == (StepKind.MIXED, 5, 2)
    assert len(steps) == before
    deployment.coordinator.step()
    assert len(steps) == before + 1
