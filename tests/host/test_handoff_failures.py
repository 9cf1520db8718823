"""Hand-offs of which something fails, in situations made by hand."""

from dataclasses import replace
from typing import Any

import pytest

from pdjax.host.sequences.sequence import State
from pdjax.interfaces.transfer import Side
from tests.host.test_coordinator import Deployment, expected
from tests.host.test_handoffs import deployed, sent

pytestmark = pytest.mark.smoke


def test_what_arrives_damaged_is_sent_again():
    house = deployed(checksums=True, retries=2)
    house.transfer.damage_rate = 1.0
    sequence = house.submit("a", prompt_len=6)
    house.run_until(lambda: house.recorder.transfers.retries == 1)
    assert sequence.state is not State.DECODING
    house.transfer.damage_rate = 0.0
    house.run()
    assert sequence.output == expected(sequence)
    assert house.recorder.transfers.reprefilled_tokens == 0


@pytest.mark.parametrize("trouble", ["damage", "loss", "send", "land"])
def test_what_fails_for_good_is_prefilled_anew_and_then_fails(trouble, monkeypatch):
    house = deployed(checksums=True, deadline=3.0, retries=1, reprefills=1, streaming=False)
    break_hand_off(house, trouble, monkeypatch)
    hit = house.submit("hit", prompt_len=6)
    house.run()
    assert hit.state is State.FAILED
    reason = {"damage": "CorruptPages: ", "loss": "HandoffTimeout: "}.get(trouble, "OSError: cut")
    assert hit.error is not None
    assert hit.error.startswith(reason)
    totals = house.recorder.transfers
    assert (totals.retries, totals.transfers) == (4, 0)  # two attempts, twice
    assert totals.reprefilled_tokens == 7
    monkeypatch.undo()
    house.transfer.damage_rate = house.transfer.loss_rate = 0.0
    late = house.submit("late", prompt_len=6)
    house.run()
    assert late.output == expected(late)


def break_hand_off(house: Deployment, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any) -> None:
        raise OSError("cut")

    match trouble:
        case "damage":
            house.transfer.damage_rate = 1.0
        case "loss":
            house.transfer.loss_rate = 1.0
        case door:
            monkeypatch.setattr(house.transfer, door, cut)


def test_a_streamed_hand_off_that_fails_is_made_again_in_bulk(monkeypatch):
    house = deployed(groups=2, retries=0)
    send, calls = house.transfer.send, []

    def cut_once(shipment):
        calls.append(shipment)
        if len(calls) == 1:
            raise OSError("cut")
        return send(shipment)

    monkeypatch.setattr(house.transfer, "send", cut_once)
    sequence = house.submit("a", prompt_len=12)
    house.run()
    assert sequence.output == expected(sequence)
    assert (sequence.streams, sequence.epoch) == (False, 0)
    assert sent(house) == [(0, 4, 3)]


def test_a_burst_is_one_attempt():
    house = deployed(groups=4, retries=1, checksums=True)
    house.transfer.damage_rate = 1.0
    house.transfer._chance.max_delay = 40  # all four are on the way at once
    sequence = house.submit("a", prompt_len=6)
    house.run_until(lambda: len(house.transfer.shipments) == 4)
    house.transfer.damage_rate = 0.0
    house.run()
    assert sequence.output == expected(sequence)
    assert (sequence.epoch, house.recorder.transfers.retries) == (0, 1)


def test_who_cannot_leave_his_engine_stays_there(monkeypatch):
    house = deployed(stages=(1, 2), rebalance=True, retries=0, reprefills=0)
    every = [house.submit(name, prompt_len=5, max_tokens=30) for name in "abcd"]
    house.run_until(lambda: all(sequence.state is State.DECODING for sequence in every))

    def cut(*_: Any) -> None:
        raise OSError("cut")

    monkeypatch.setattr(house.transfer, "send", cut)
    for sequence in every:
        if sequence.engine == 1:
            house.coordinator.abort(sequence.request.id)
    house.run()
    assert house.recorder.transfers.retries > 0
    stayed = [sequence for sequence in every if sequence.state is not State.ABORTED]
    assert [sequence.output for sequence in stayed] == [expected(each) for each in stayed]
    assert house.recorder.transfers.reprefilled_tokens == 0


class Broken:
    """A landing that writes nothing, and fails some looks later."""

    def __init__(self, looks: int) -> None:
        self._looks = looks

    def ready(self) -> bool:
        self._looks -= 1
        return self._looks < 0

    def result(self) -> int:
        raise OSError("the device has gone")


def test_pages_that_were_never_written_fail_whoever_relied_on_them(monkeypatch):
    """Without checksums a sequence sits down before the writing has been looked at."""
    house = deployed(prefix_cache=True, streaming=False)
    with monkeypatch.context() as patch:
        patch.setattr(house.transfer, "land", lambda *_: Broken(looks=2))
        hit = house.submit("hit", prompt_len=9, max_tokens=20)
        house.run()
    assert (hit.state, hit.error) == (State.FAILED, "OSError: the device has gone")
    late = house.submit("late", prompt_len=9)
    house.run()
    assert late.output == expected(late)  # not from pages that hold nothing


def test_pages_that_were_never_written_fail_whoever_found_them(monkeypatch):
    house = deployed(prefix_cache=True, streaming=False)
    with monkeypatch.context() as patch:
        patch.setattr(house.transfer, "land", lambda *_: Broken(looks=9))
        hit = house.submit("hit", prompt_len=9, max_tokens=30)
        house.run_until(lambda: hit.state is State.DECODING)
    found = house.submit("found", prompt_len=9, max_tokens=30)
    house.run_until(lambda: found.state is State.DECODING)
    assert house.recorder.request(found).transfer.pages_skipped == 2
    waiting = house.submit("waiting", prompt_len=9)
    house.run()
    assert {hit.error, found.error} == {"OSError: the device has gone"}
    assert waiting.output == expected(waiting)


def test_whoever_has_reserved_upon_pages_that_were_never_written_gets_them(monkeypatch):
    """What the target was thought to have is sent after all."""
    house = deployed(prefix_cache=True, groups=2)
    with monkeypatch.context() as patch:
        patch.setattr(house.transfer, "land", lambda *_: Broken(looks=12))
        hit = house.submit("hit", prompt_len=9, max_tokens=30)
        house.run_until(lambda: hit.state is State.DECODING)
    long = house.submit("long", prompt_len=33)
    house.run_until(lambda: long.handoff is not None)
    assert long.handoff.skipped_tokens == 8
    house.run_until(lambda: hit.done)
    assert not long.done
    house.run()
    assert (hit.state, long.output) == (State.FAILED, expected(long))


@pytest.mark.parametrize(
    ("looks", "found_in", "ends"),
    [(4, State.PREFILLING, State.FINISHED), (6, State.TRANSFERRING, State.FAILED)],
)
def test_pages_given_back_that_were_never_written(looks, found_in, ends, monkeypatch):
    """Who is being prefilled upon them begins anew; who has a token from them fails."""
    house = deployed(prefix_cache=True, give_back=True, streaming=False)
    land = house.transfer.land

    def lose_what_is_given_back(ticket, pages):
        back = ticket.shipment.target.side is Side.PREFILL
        return Broken(looks) if back else land(ticket, pages)

    monkeypatch.setattr(house.transfer, "land", lose_what_is_given_back)
    first = house.submit("first", prompt_len=8, max_tokens=9)
    house.run_until(lambda: len(house.transfer.shipments) == 2)
    house.coordinator.step()
    prompt = (*first.token_ids, *range(1, 13))
    [second] = house.coordinator.submit(
        replace(first.request, id="second", prompt_token_ids=prompt)
    )
    house.run_until(lambda: second.state is found_in)
    assert (second.cached_tokens, second.epoch) == (16, 0)
    house.run()
    assert (second.state, second.epoch) == (ends, int(ends is State.FINISHED))
    if ends is State.FINISHED:
        assert second.output == expected(second)
    else:
        assert second.error == "OSError: the device has gone"


def test_a_part_that_was_never_written_is_sent_again_whatever_failed_meanwhile(monkeypatch):
    house = deployed(groups=2, retries=3)
    send, land, landings = house.transfer.send, house.transfer.land, iter([Broken(looks=1)])

    def fails_second(shipment):
        ticket = send(shipment)
        if len(house.transfer.shipments) == 2:
            monkeypatch.setattr(ticket, "result", Broken(looks=0).result)
        return ticket

    def fails_first(*args):
        return next(landings, None) or land(*args)

    monkeypatch.setattr(house.transfer, "send", fails_second)
    monkeypatch.setattr(house.transfer, "land", fails_first)
    sequence = house.submit("a", prompt_len=7)
    house.run()
    assert (sequence.state, sequence.output) == (State.FINISHED, expected(sequence))
