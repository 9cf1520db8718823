"""What the coordinator does with a sequence whose work was broken off."""

from typing import Any

import pytest

from pdjax.request import State
from tests.unit.test_coordinator import deploy, expected

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("where", ["prefill", "tick", "start"])
def test_an_interrupt_ends_only_the_work_it_hit(monkeypatch, where, stages):
    """Who presses a key leaves nobody with half a step behind him: no wrong token, no hang."""
    house = deploy(stages=(stages,))
    engine = {"prefill": house.prefill[0], "tick": house.decode[0], "start": house.transfer}[where]
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


def test_text_that_was_held_back_is_shown_when_a_sequence_is_aborted():
    class Text:
        finished = False

        def push(self, token: int) -> None:
            pass

        def finish(self) -> None:
            self.finished = True

    house = deploy(make_text=lambda request: Text())
    sequence = house.submit("a")
    house.run_until(lambda: bool(sequence.output))
    house.coordinator.abort("a")
    house.run()
    assert sequence.text.finished
