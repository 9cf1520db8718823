"""The first tick of a lone sequence is dispatched before the host knows the sequence's first token;
whatever that token is, and whatever happens until it is known, nothing wrong is told and nothing is
left behind."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pdjax.config import DecodeConfig, HandoffConfig
from pdjax.core.ids import EngineId
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.interfaces.batches import NOT_FINITE
from pdjax.interfaces.events import EngineLost
from tests.helpers.alone import Alone
from tests.helpers.deployment import CONFIG, Deployment, deploy, expected
from tests.helpers.fake_guides import VOCAB
from tests.helpers.fakes import Chance, FakeText, InjectedError
from tests.helpers.walks import run_all

CHECKED = replace(CONFIG, handoff=HandoffConfig(checksums=True))
BULK = replace(CONFIG, handoff=HandoffConfig(streaming=False))
AHEAD = replace(CONFIG, decode=DecodeConfig(rows=2, lookahead=1))


class Late:
    """A deployment whose prefill steps do not come back before they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config=CONFIG, **options: Any) -> None:
        self.deployment = deploy(config, **{"groups": 2, **options})
        self.open, self.prefills = False, 0
        [prefill] = self.deployment.prefill
        submit = prefill.submit

        def submit_late(step: Any) -> Any:
            self.prefills += 1
            ticket = submit(step)
            monkeypatch.setattr(ticket, "ready", lambda: self.open)
            return ticket

        monkeypatch.setattr(prefill, "submit", submit_late)
        self.steps: list[Any] = []
        decode = self.deployment.decode[0]
        tick = decode.submit

        def note(step: Any) -> Any:
            self.steps.append(step)
            return tick(step)

        monkeypatch.setattr(decode, "submit", note)

    def wait(self) -> int:
        """Turn for a while; the number of ticks that were dispatched."""
        for _ in range(8):
            self.deployment.coordinator.step()
            self.deployment.coordinator.check()
        return len(self.steps)

    def let_go(self) -> Deployment:
        """Let the prefill steps come back, and everything end."""
        self.open = True
        self.deployment.run()
        for state in self.deployment.coordinator.loop.fleet:
            assert state.free_rows == (state.pipeline.rows if state.pipeline else 0)
            assert state.allocator.free_pages == state.allocator.total
        return self.deployment


@pytest.mark.smoke
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(("prompt_len", "ticks"), [(2, 2), (3, 1), (4, 2), (13, 2)])
def test_a_lone_sequence_has_its_first_tick_before_its_first_token(
    monkeypatch, stages, prompt_len, ticks
):
    """A page has room for 4 tokens, and a step for 8."""
    late = Late(monkeypatch, AHEAD, stages=(stages,))
    sequence = late.deployment.submit("a", prompt_len)
    if prompt_len > 8:  # the first chunk
        late.wait()
        late.open = True
        late.deployment.run_until(lambda: sequence.prefilled == prompt_len)
        late.open = False
    assert late.wait() == (ticks if stages == 1 else 2), "as far as lookahead and pages go"
    assert (sequence.state, sequence.output) == (State.PREFILLING, [])
    metrics = late.let_go().recorder.request(sequence)
    assert sequence.output == expected(sequence)
    assert [name for name, _ in metrics.marks[-4:]] == [
        "transfer_landed", "decoding", "first_tick", "finished",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "params"),
    [
        (CONFIG, {"presence_penalty": 0.5}),
        (CONFIG, {"allowed_token_ids": [1, 2, 3]}),
        (CONFIG, {"min_tokens": 2, "ignore_eos": False}),
        (CONFIG, {"max_tokens": 1}),
        (CONFIG, {"n": 2, "temperature": 1.0}),
        (CHECKED, {}),
        (BULK, {}),
    ],
)
def test_what_needs_the_host_waits_for_it(monkeypatch, config, params):
    late = Late(monkeypatch, config)
    sequence = late.deployment.submit("a", **params)
    assert late.wait() == 0
    late.let_go()
    assert sequence.output == expected(sequence)


def test_an_engine_with_other_rows_waits_for_nobody(monkeypatch):
    late = Late(monkeypatch)
    other = late.deployment.submit("other", max_tokens=30)
    late.open = True
    late.deployment.run_until(lambda: len(other.output) == 2)
    late.open = False
    sequence = late.deployment.submit("a")
    late.wait()
    assert len(other.output) == 10, "one a turn"
    assert all((step.batch.positions >= 0).sum() == 1 for step in late.steps)
    late.let_go()
    assert (sequence.output, other.output) == (expected(sequence), expected(other))


def test_one_that_comes_meanwhile_joins(monkeypatch):
    late = Late(monkeypatch, AHEAD)
    first = late.deployment.submit("a", 2, max_tokens=9)
    assert late.wait() == 2
    second = late.deployment.submit("b", max_tokens=9)
    late.wait()
    late.let_go()
    assert (first.output, second.output) == (expected(first), expected(second))


@pytest.mark.parametrize(
    "why", ["token", "text", "not finite", "abort", "error", "preempted", "lost"]
)
def test_what_ends_before_its_second_token_leaves_nothing(monkeypatch, why):
    texts = {"text": lambda request: FakeText(1, None)}
    late = Late(monkeypatch, AHEAD, make_text=texts.get(why))
    deployment = late.deployment
    stops = range(VOCAB) if why == "token" else ()
    sequence = deployment.submit("a", 2, stop_token_ids=stops)
    assert late.wait() == 2
    again = _end(deployment, sequence, why)
    late.wait()
    late.let_go()
    if again:
        assert sequence.output == expected(sequence) and sequence.epoch == 1
    else:
        assert len(sequence.output) == (why in ("token", "text"))
    heir = deployment.submit("heir")
    deployment.run()
    assert heir.output == expected(heir)[: len(heir.output)] != []


def _end(deployment: Deployment, sequence: Sequence, why: str) -> bool:
    """Let something happen to a sequence whose row runs ahead; whether it starts over."""
    loop = deployment.coordinator.loop
    ticket: Any = loop.fleet.prefill[0].in_flight[0].ticket
    match why:
        case "abort":
            deployment.coordinator.abort("a")
        case "error":
            ticket._error = InjectedError("prefill")
        case "preempted":
            loop.lifecycle.preempt(sequence)
        case "not finite":
            tokens = np.full_like(ticket._result.tokens, NOT_FINITE)
            ticket._result = replace(ticket._result, tokens=tokens)
        case "lost":
            with suppress(InjectedError), deployment.decode[0].pages.donated(Chance(0)):
                raise InjectedError
            deployment.events.post(EngineLost(EngineId("decode/0"), 1))
    return why in ("preempted", "lost")


def test_kv_that_does_not_come_well_is_sent_once_more_and_not_ahead(monkeypatch):
    late = Late(monkeypatch, AHEAD)
    write, failed = late.deployment.transport.write, list[int]()

    def write_badly(job_id: int, pages: Any) -> Any:
        ticket = write(job_id, pages)
        if not late.open and len(late.deployment.transport.jobs) == 2 and not failed:
            failed.append(job_id)
            ticket._error = InjectedError("write")
        return ticket

    monkeypatch.setattr(late.deployment.transport, "write", write_badly)
    sequence = late.deployment.submit("a")
    late.wait()
    late.let_go()
    assert failed and sequence.output == expected(sequence)


def test_a_policy_that_keeps_sequences_is_not_asked_too_late(monkeypatch):
    late = Late(monkeypatch, AHEAD)
    policy = late.deployment.coordinator._policies.handoff
    monkeypatch.setattr(policy, "stays", lambda sequence: True)
    sequence = late.deployment.submit("a", 2)
    assert late.wait() == 2
    late.let_go()
    assert sequence.output == expected(sequence) and late.prefills == 1


def test_a_lease_that_ends_takes_the_row(monkeypatch):
    late = Late(monkeypatch, replace(AHEAD, handoff=HandoffConfig(lease=5.0)))
    sequence = late.deployment.submit("a", 2)
    assert late.wait() == 2
    late.deployment.clock.advance_to(late.deployment.clock.now() + 10.0)
    late.wait()
    assert late.deployment.coordinator.loop.fleet.engines[EngineId("decode/0")].free_rows == 2
    late.let_go()
    assert sequence.output == expected(sequence) and sequence.epoch == 1


@pytest.mark.parametrize("faults", [False, True])
def test_requests_that_come_alone(faults):
    happened = run_all(range(70_000, 70_040), faults=faults, make=Alone)
    assert happened["ran ahead"] > 10
