"""What the coordinator does with a sequence whose work was broken off."""

from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import HandoffConfig
from pdjax.host.text import TextStream
from pdjax.request import State
from tests.fakes import FakeTicket, InjectedError
from tests.unit.test_coordinator import CONFIG, deploy, expected

pytestmark = pytest.mark.smoke

CONFIG_IN_BULK = replace(CONFIG, handoff=HandoffConfig(streaming=False))


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("where", ["prefill", "tick"])
def test_an_interrupt_ends_only_the_work_it_hit(monkeypatch, where, stages):
    """Who presses a key leaves nobody with half a step behind him: no wrong token, no hang."""
    house = deploy(stages=(stages,))
    engine = {"prefill": house.prefill[0], "tick": house.decode[0]}[where]
    early = house.submit("early")
    if where == "tick":
        house.run_until(lambda: len(early.output) >= 2)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        house.run()
    monkeypatch.undo()
    assert early.state is State.FAILED
    assert early.error == "KeyboardInterrupt: "
    late = house.submit("late")
    house.run()
    assert late.output == expected(late)


@pytest.mark.parametrize("where", ["send", "land"])
def test_an_interrupted_hand_off_goes_on(monkeypatch, where):
    """Nothing of it is lost: it is sent again."""
    house = deploy(stages=(2,))
    hit = house.submit("hit")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(house.transfer, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            house.run()
    house.coordinator.check()
    house.run()
    assert hit.output == expected(hit)


@pytest.mark.parametrize("door", ["prefill", "tick"])
def test_an_interrupt_while_reading_loses_nobody(door, monkeypatch):
    house = deploy(CONFIG_IN_BULK, stages=(2,))
    hit = house.submit("hit")
    state = {"prefill": State.PREFILLING, "tick": State.DECODING}[door]
    house.run_until(lambda: hit.state is state)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FakeTicket, "result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            house.run()
    house.coordinator.check()
    assert (hit.state, hit.finish_reason) == (State.FAILED, "error")
    late = house.submit("late")
    house.run()
    assert late.output == expected(late)


class Letters:
    """A decoder that holds each letter back until the next token, and may break at the end."""

    def __init__(self, breaks: bool) -> None:
        self.breaks = breaks
        self.held = ""

    def push(self, token_id: int) -> str:
        text, self.held = self.held, chr(ord("a") + token_id % 26)
        return text

    def flush(self) -> str:
        if self.breaks:
            raise InjectedError("half a character")
        return self.held


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("how", ["abort", "fail"])
def test_pieces_add_up_to_the_text_however_it_ends(how, breaks):
    stop = tuple(chr(ord("a") + letter) + "?" for letter in range(26))  # holds a letter back, too
    house = deploy(make_text=lambda request: TextStream(Letters(breaks), stop))
    sequence, pieces = house.submit("a", max_tokens=30), []
    while len(sequence.output) < 4:
        house.coordinator.step()
        pieces.append(sequence.text.take())
    if how == "abort":
        house.coordinator.abort("a")
    else:
        house.coordinator._roster.fail(sequence, RuntimeError("the mesh has gone"))
    pieces.append(sequence.text.take())
    assert "".join(pieces) == sequence.text.text
    assert len(sequence.text.text) == (3 if breaks else 4)
    house.run()
