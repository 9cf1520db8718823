"""Plans that are overtaken: before a step of an engine is dispatched, what its plan was made upon
is lost, evicted, aborted or taken, such as by an earlier plan in a pool that engines share."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import HandoffConfig, KVConfig
from pdjax.core.ids import EngineId
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.interfaces.events import JobWritten
from tests.helpers.deployment import CONFIG, Deployment, deploy, expected
from tests.helpers.fakes import UndecidedWrite


def deployed(pages: int = 40, *, prefix_cache: bool = True, **handoff: Any) -> Deployment:
    """Two prefill engines, whose steps have two layer groups."""
    config = replace(
        CONFIG,
        kv=KVConfig(prefix_cache=prefix_cache),
        handoff=HandoffConfig(streaming=False, **handoff),
    )
    return deploy(config, pages=(pages, 40), prefills=2, groups=2)


def before_the_other_plan(
    deployment: Deployment, then: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Have something happen when the next step of the first prefill engine has been dispatched, and
    that of the second has only been planned."""
    runner = deployment.coordinator.loop._prefill
    dispatch = runner.dispatch

    def overtaken(state, chunks):
        dispatch(state, chunks)
        if state.id == EngineId("prefill/0"):
            monkeypatch.setattr(runner, "dispatch", dispatch)
            then()

    monkeypatch.setattr(runner, "dispatch", overtaken)


def test_a_prefix_that_is_lost_while_another_engine_is_given_its_step(monkeypatch):
    deployment = deployed(give_back=True)
    writing, write, given_back = UndecidedWrite(), deployment.transport.write, list[int]()

    def undecided_if_given_back(job_id, pages):
        [job] = [job for job in deployment.transport.jobs if job.id == job_id]
        if job.target == deployment.prefill[1].pool:
            given_back.append(job_id)
            return writing
        return write(job_id, pages)

    monkeypatch.setattr(deployment.transport, "write", undecided_if_given_back)
    # Keeps the first engine busy.
    other = deployment.submit("other", prompt=tuple(range(50, 60)), max_tokens=3)
    first = deployment.submit("first", prompt=tuple(range(1, 9)), max_tokens=9)
    deployment.run_until(lambda: first.done and other.done)
    for _ in range(4):
        deployment.coordinator.step()
    assert first.home == EngineId("prefill/1")

    def fail() -> None:
        writing.fails = True
        deployment.coordinator.loop._write_transfers([JobWritten(given_back[0])])

    before_the_other_plan(deployment, fail, monkeypatch)
    late = deployment.submit("late", prompt=tuple(range(70, 77)), max_tokens=3)
    second = deployment.submit("second", prompt=(*first.token_ids, 5, 6, 7), max_tokens=3)
    deployment.coordinator.step()
    assert writing.fails and second.state is State.WAITING
    monkeypatch.undo()
    deployment.run()
    assert [late.output, second.output] == [expected(late), expected(second)]
    assert second.cached_tokens < 16


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_sequence_that_is_preempted_while_another_engine_is_given_its_step(
    prefix_cache, monkeypatch
):
    """With its pages still cached it may go on from them at once."""
    deployment = deployed(prefix_cache=prefix_cache)
    a, b = two_long_prompts(deployment)
    before_the_other_plan(
        deployment, lambda: deployment.coordinator.loop.lifecycle.preempt(b), monkeypatch
    )
    deployment.coordinator.step()
    assert b.epoch == 1
    assert (b.state is State.WAITING) != prefix_cache
    deployment.run()
    assert [a.output, b.output] == [expected(a), expected(b)]


def test_a_sequence_that_is_aborted_while_another_engine_is_given_its_step(monkeypatch):
    deployment = deployed()
    a, b = two_long_prompts(deployment)
    before_the_other_plan(deployment, lambda: deployment.coordinator.abort("b"), monkeypatch)
    deployment.run()
    assert (b.state, a.output) == (State.ABORTED, expected(a))


def two_long_prompts(deployment: Deployment) -> list[Sequence]:
    """One on each engine, of which the first chunk has been dispatched."""
    a, b = (
        deployment.submit(name, prompt=tuple(range(first, first + 20)), max_tokens=3)
        for name, first in [("a", 1), ("b", 41)]
    )
    deployment.run_until(lambda: b.prefilled == 8)
    assert [each.engine for each in (a, b)] == [EngineId("prefill/0"), EngineId("prefill/1")]
    return [a, b]


@pytest.mark.parametrize("cached", [False, True])
def test_pages_that_are_taken_while_another_engine_is_given_its_step(cached, monkeypatch):
    """Free ones, and such as hold the known front of a prompt, which is evicted for them."""
    deployment = deployed(pages=11)
    prompt = tuple(range(1, 21))
    allocator = deployment.state(deployment.prefill[1]).allocator
    if cached:
        deployment.submit("other", prompt=tuple(range(41, 51)), max_tokens=3)
        warm = deployment.submit("warm", prompt=prompt, max_tokens=3)
        deployment.run()
        assert warm.home == EngineId("prefill/1")
    taken: list[int] = []
    before_the_other_plan(
        deployment, lambda: taken.extend(allocator.allocate(allocator.free_pages)), monkeypatch
    )
    a = deployment.submit("a", prompt=tuple(range(61, 71)), max_tokens=3)
    b = deployment.submit("b", prompt=prompt, max_tokens=3)
    deployment.coordinator.step()
    assert taken and b.state is State.WAITING
    allocator.free(taken)
    deployment.run()
    assert [a.output, b.output] == [expected(a), expected(b)]
