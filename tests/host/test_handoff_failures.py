"""Hand-offs of which something fails, in situations made by hand."""

from dataclasses import replace
from typing import Any

import pytest

from pdjax.core.ids import EngineId
from pdjax.host.sequences.sequence import State
from tests.helpers.deployment import Deployment, expected
from tests.helpers.fakes import UndecidedWrite
from tests.host.test_handoffs import deployed, route, sent


def test_what_arrives_damaged_is_sent_again():
    deployment = deployed(checksums=True, retries=2)
    deployment.transport.damage_rate = 1.0
    sequence = deployment.submit("a", prompt_len=6)
    deployment.run_until(lambda: deployment.recorder.transfers.retries == 1)
    assert sequence.state is not State.DECODING
    deployment.transport.damage_rate = 0.0
    deployment.run()
    assert sequence.output == expected(sequence)
    assert deployment.recorder.transfers.reprefilled_tokens == 0


@pytest.mark.parametrize("trouble", ["damage", "loss", "send", "write"])
def test_what_fails_for_good_is_prefilled_again_and_then_fails(trouble, monkeypatch):
    deployment = deployed(checksums=True, deadline=3.0, retries=1, reprefills=1, streaming=False)
    break_hand_off(deployment, trouble, monkeypatch)
    hit = deployment.submit("hit", prompt_len=6)
    deployment.run()
    assert hit.state is State.FAILED
    reason = {"damage": "CorruptPages: ", "loss": "HandoffTimeout: "}.get(trouble, "OSError: cut")
    assert hit.error is not None
    assert hit.error.startswith(reason)
    totals = deployment.recorder.transfers
    assert (totals.retries, totals.transfers) == (4, 0)  # two attempts, twice
    assert totals.reprefilled_tokens == 7
    monkeypatch.undo()
    deployment.transport.damage_rate = deployment.transport.loss_rate = 0.0
    late = deployment.submit("late", prompt_len=6)
    deployment.run()
    assert late.output == expected(late)


def break_hand_off(deployment: Deployment, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any) -> None:
        raise OSError("cut")

    match trouble:
        case "damage":
            deployment.transport.damage_rate = 1.0
        case "loss":
            deployment.transport.loss_rate = 1.0
        case door:
            monkeypatch.setattr(deployment.transport, door, cut)


def test_a_streamed_hand_off_that_fails_is_made_again_in_bulk(monkeypatch):
    deployment = deployed(groups=2, retries=0)
    send, calls = deployment.transport.send, []

    def cut_once(job):
        calls.append(job)
        if len(calls) == 1:
            raise OSError("cut")
        return send(job)

    monkeypatch.setattr(deployment.transport, "send", cut_once)
    sequence = deployment.submit("a", prompt_len=12)
    deployment.run()
    assert sequence.output == expected(sequence)
    assert (sequence.streams, sequence.epoch) == (False, 0)
    # What the step exports of its other layer group has left with it, and is of no use.
    assert sent(deployment) == [(2, 4, 2), (0, 4, 3)]
    assert not deployment.transport.under_way


def test_exports_of_a_step_that_breaks_after_them_are_cancelled(monkeypatch):
    """The transport would keep what has arrived for ever."""
    deployment = deployed(groups=2)
    submit = deployment.prefill[0].submit

    def breaks_late(step):
        submit(step)
        raise OSError("the device has gone")

    monkeypatch.setattr(deployment.prefill[0], "submit", breaks_late)
    hit = deployment.submit("hit", prompt_len=12)
    deployment.run_until(lambda: hit.done)
    assert hit.error == "OSError: the device has gone"
    assert len(deployment.transport.jobs) == 2 and not deployment.transport.under_way
    assert deployment.coordinator.loop.handoffs.queue.bytes_in_flight == 0


def test_a_burst_is_one_attempt():
    deployment = deployed(groups=4, retries=1, checksums=True)
    deployment.transport.damage_rate = 1.0
    deployment.transport._chance.max_delay = 40  # all four are on the way at once
    sequence = deployment.submit("a", prompt_len=6)
    deployment.run_until(lambda: len(deployment.transport.jobs) == 4)
    deployment.transport.damage_rate = 0.0
    deployment.run()
    assert sequence.output == expected(sequence)
    assert (sequence.epoch, deployment.recorder.transfers.retries) == (0, 1)


def test_a_sequence_that_cannot_leave_its_engine_stays_there(monkeypatch):
    deployment = deployed(stages=(1, 2), rebalance=True, retries=0, reprefills=0)
    every = [deployment.submit(name, prompt_len=5, max_tokens=30) for name in "abcd"]
    deployment.run_until(lambda: all(sequence.state is State.DECODING for sequence in every))

    def cut(*_: Any) -> None:
        raise OSError("cut")

    monkeypatch.setattr(deployment.transport, "send", cut)
    for sequence in every:
        if sequence.engine == EngineId("decode/1"):
            deployment.coordinator.abort(sequence.request.id)
    deployment.run()
    assert deployment.recorder.transfers.retries > 0
    stayed = [sequence for sequence in every if sequence.state is not State.ABORTED]
    assert [sequence.output for sequence in stayed] == [expected(each) for each in stayed]
    assert deployment.recorder.transfers.reprefilled_tokens == 0


def test_pages_that_were_never_written_fail_the_sequence_that_relied_on_them(monkeypatch):
    """Without checksums a sequence decodes before the writing has been looked at."""
    deployment, writing = deployed(prefix_cache=True, streaming=False), UndecidedWrite()
    with monkeypatch.context() as patch:
        patch.setattr(deployment.transport, "write", lambda *_: writing)
        hit = deployment.submit("hit", prompt_len=9, max_tokens=20)
        deployment.run_until(lambda: len(hit.output) > 2)
        writing.fails = True
        deployment.run()
    assert (hit.state, hit.error) == (State.FAILED, "OSError: the device has gone")
    late = deployment.submit("late", prompt_len=9)
    deployment.run()
    assert late.output == expected(late)  # not from pages that hold nothing


def test_pages_that_were_never_written_fail_the_sequence_that_found_them(monkeypatch):
    deployment, writing = deployed(prefix_cache=True, streaming=False), UndecidedWrite()
    with monkeypatch.context() as patch:
        patch.setattr(deployment.transport, "write", lambda *_: writing)
        hit = deployment.submit("hit", prompt_len=9, max_tokens=30)
        deployment.run_until(lambda: hit.state is State.DECODING)
    found = deployment.submit("found", prompt_len=9, max_tokens=30)
    deployment.run_until(lambda: found.state is State.DECODING)
    assert deployment.recorder.request(found).transfer.pages_skipped == 2
    waiting = deployment.submit("waiting", prompt_len=9)
    deployment.coordinator.step()
    writing.fails = True
    deployment.run()
    assert {hit.error, found.error} == {"OSError: the device has gone"}
    assert waiting.output == expected(waiting)


def test_a_reservation_upon_pages_that_were_never_written_gets_them(monkeypatch):
    """What the target was thought to have is sent after all."""
    deployment, writing = deployed(prefix_cache=True, groups=2), UndecidedWrite()
    with monkeypatch.context() as patch:
        patch.setattr(deployment.transport, "write", lambda *_: writing)
        hit = deployment.submit("hit", prompt_len=9, max_tokens=30)
        deployment.run_until(lambda: hit.state is State.DECODING)
    long = deployment.submit("long", prompt_len=33)
    deployment.run_until(lambda: long.handoff is not None)
    assert long.handoff.skipped_tokens == 8
    writing.fails = True
    deployment.run_until(lambda: hit.done)
    assert not long.done
    deployment.run()
    assert (hit.state, long.output) == (State.FAILED, expected(long))


def goes_back(deployment: Deployment, job_id: int) -> bool:
    """Whether a transfer job goes to the prefill pool."""
    [job] = [job for job in deployment.transport.jobs if job.id == job_id]
    return route(job)[1] == "hbm/prefill-0"


@pytest.mark.parametrize(
    ("found_in", "ends"),
    [(State.PREFILLING, State.FINISHED), (State.TRANSFERRING, State.FAILED)],
)
def test_pages_given_back_that_were_never_written(found_in, ends, monkeypatch):
    """A sequence that is prefilled upon them starts over; one that has a token from them fails."""
    deployment = deployed(prefix_cache=True, give_back=True, streaming=False)
    write, writing = deployment.transport.write, UndecidedWrite()

    def lose_what_is_given_back(job_id, pages):
        back = goes_back(deployment, job_id)
        return writing if back else write(job_id, pages)

    monkeypatch.setattr(deployment.transport, "write", lose_what_is_given_back)
    first = deployment.submit("first", prompt_len=8, max_tokens=9)
    deployment.run_until(lambda: len(deployment.transport.jobs) == 2)
    deployment.coordinator.step()
    prompt = (*first.token_ids, *range(1, 13))
    [second] = deployment.coordinator.submit(
        replace(first.request, id="second", prompt_token_ids=prompt)
    )
    deployment.run_until(lambda: second.state is found_in)
    assert (second.cached_tokens, second.epoch) == (16, 0)
    writing.fails = True
    deployment.run()
    assert (second.state, second.epoch) == (ends, int(ends is State.FINISHED))
    if ends is State.FINISHED:
        assert second.output == expected(second)
    else:
        assert second.error == "OSError: the device has gone"


def test_a_part_that_was_never_written_is_sent_again_whatever_failed_meanwhile(monkeypatch):
    """The first of two jobs is not written, which is seen when the second has failed."""
    deployment, writing = deployed(groups=2, retries=3), UndecidedWrite()
    send, write, writes = deployment.transport.send, deployment.transport.write, [writing]

    def fails_second(job):
        ticket = send(job)
        jobs = len(deployment.transport.jobs)
        if jobs == 2:
            monkeypatch.setattr(ticket, "result", writing.result)
        writing.fails = jobs > 2
        return ticket

    def fails_first(*args):
        return writes.pop() if writes else write(*args)

    monkeypatch.setattr(deployment.transport, "send", fails_second)
    monkeypatch.setattr(deployment.transport, "write", fails_first)
    sequence = deployment.submit("a", prompt_len=7)
    deployment.run()
    assert [layers for layers, *_ in sent(deployment)] == [0, 2, 2, 0]
    assert (sequence.state, sequence.output) == (State.FINISHED, expected(sequence))
