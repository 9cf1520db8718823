"""An interrupt in the coordinator's loop ends only the sequence whose work it hit."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from experiments.hostile.faults import interrupted_at
from pdjax.config import HandoffConfig
from pdjax.host.sequences.sequence import State
from pdjax.text.text_stream import TextStream
from tests.helpers.deployment import CONFIG, deploy, expected
from tests.helpers.fakes import FakeTicket, InjectedError

pytestmark = pytest.mark.smoke

CONFIG_IN_BULK = replace(CONFIG, handoff=HandoffConfig(streaming=False))


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_an_interrupt_ends_only_the_work_it_hit(monkeypatch, where, stages):
    """An interrupt leaves no sequence with half a step: no wrong token, no hang."""
    deployment = deploy(stages=(stages,))
    engine = {"prefill": deployment.prefill[0], "decode": deployment.decode[0]}[where]
    early = deployment.submit("early")
    if where == "decode":
        deployment.run_until(lambda: len(early.output) >= 2)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "submit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        deployment.run()
    monkeypatch.undo()
    assert early.state is State.FAILED
    assert early.error == "KeyboardInterrupt: "
    late = deployment.submit("late")
    deployment.run()
    assert late.output == expected(late)


@pytest.mark.parametrize("where", ["send", "write"])
def test_an_interrupted_hand_off_goes_on(monkeypatch, where):
    """Nothing of it is lost: it is sent again."""
    deployment = deploy(stages=(2,))
    hit = deployment.submit("hit")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(deployment.transport, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            deployment.run()
    deployment.coordinator.check()
    deployment.run()
    assert hit.output == expected(hit)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_an_interrupt_while_reading_loses_no_other_sequence(kind, monkeypatch):
    deployment = deploy(CONFIG_IN_BULK, stages=(2,))
    hit = deployment.submit("hit")
    state = {"prefill": State.PREFILLING, "decode": State.DECODING}[kind]
    deployment.run_until(lambda: hit.state is state)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FakeTicket, "result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            deployment.run()
    deployment.coordinator.check()
    assert (hit.state, hit.finish_reason) == (State.FAILED, "error")
    late = deployment.submit("late")
    deployment.run()
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
    deployment = deploy(make_text=lambda request: TextStream(Letters(breaks), stop))
    sequence, pieces = deployment.submit("a", max_tokens=30), []
    text = sequence.text
    assert isinstance(text, TextStream)
    while len(sequence.output) < 4:
        deployment.coordinator.step()
        pieces.append(text.take())
    if how == "abort":
        deployment.coordinator.abort("a")
    else:
        deployment.coordinator.loop.lifecycle.fail(sequence, RuntimeError("the mesh has gone"))
    pieces.append(text.take())
    assert "".join(pieces) == text.text
    assert len(text.text) == (3 if breaks else 4)
    deployment.run()


@pytest.mark.parametrize("how", ["abort", "run"])
def test_an_interrupt_out_of_any_line_leaks_nothing(how):
    """Wherever a turn or an abort is broken off, all that is left is whole: a sequence that has not
    failed by it gets its exact answer, and so does one that comes later."""

    def day(line: int) -> int:
        deployment = deploy(stages=(2,), groups=2)
        sequences = [deployment.submit(f"s{i}", prompt_len=3 + 4 * i, logprobs=1) for i in range(4)]
        with interrupted_at(line) as seen, suppress(KeyboardInterrupt):
            deployment.run_until(lambda: len(sequences[1].output) >= 3)
            if how == "abort":
                deployment.coordinator.abort("s1")
                deployment.coordinator.abort("s3")
        deployment.coordinator.check()
        deployment.run()
        late = deployment.submit("late")
        deployment.run()
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
