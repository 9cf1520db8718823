"""An interrupt in the coordinator's loop ends only the sequence whose work it hit."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from experiments.hostile import interrupted_at
from pdjax.config import HandoffConfig
from pdjax.host.sequences.sequence import State
from pdjax.text.text_stream import TextStream
from tests.helpers.fakes import FakeTicket, InjectedError
from tests.host.test_coordinator import CONFIG, deploy, expected

pytestmark = pytest.mark.smoke

CONFIG_IN_BULK = replace(CONFIG, handoff=HandoffConfig(streaming=False))


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("where", ["prefill", "tick"])
def test_an_interrupt_ends_only_the_work_it_hit(monkeypatch, where, stages):
    """Ctrl-C leaves no sequence with half a step: no wrong token, no hang."""
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
    """No KV is lost: the hand-off is sent again."""
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


@pytest.mark.parametrize("how", ["abort", "run"])
def test_an_interrupt_out_of_any_line_leaks_nothing(how):
    """Wherever an interrupt breaks off a turn or an abort, the rest stays consistent: sequences
    that did not fail by it get their exact answers, and so do later ones."""

    def day(line: int) -> int:
        house = deploy(stages=(2,), groups=2)
        sequences = [house.submit(f"s{i}", prompt_len=3 + 4 * i, logprobs=1) for i in range(4)]
        with interrupted_at(line) as seen, suppress(KeyboardInterrupt):
            house.run_until(lambda: len(sequences[1].output) >= 3)
            if how == "abort":
                house.coordinator.abort("s1")
                house.coordinator.abort("s3")
        house.coordinator.check()
        house.run()
        late = house.submit("late")
        house.run()
        assert late.output == expected(late)
        for sequence in sequences:
            if sequence.state is State.FINISHED:
                assert sequence.output == expected(sequence)
                assert len(sequence.logprobs) == len(sequence.output)
            else:
                assert sequence.state in (State.FAILED, State.ABORTED)
                assert sequence.state is State.ABORTED or sequence.error == "KeyboardInterrupt: "
        return seen[0]

    lines = day(-1)
    for line in range(1, lines, max(1, lines // 40)):
        day(line)
