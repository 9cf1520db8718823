"""Guides that threads follow: rows sit out until it is known what may follow, and nobody else
waits. The random walks have guides that take any number of turns."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pdjax.core.guide import Guide
from pdjax.core.request import Request, SamplingParams
from pdjax.host.sequences.guide_threads import GuideThreads
from pdjax.host.sequences.sequence import Sequence, State
from tests.helpers.deployment import Deployment, deploy, expected
from tests.helpers.fake_guides import FakeGuide


class Gate:
    """Lets the guides of some requests through when it is opened; those of `bad` ones break."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.error: type[BaseException] = ValueError

    def guide(self, request: Request) -> FakeGuide | None:
        gate = self

        class Held(FakeGuide):
            def push(self, token_id: int) -> None:
                if request.id.startswith("bad"):
                    raise gate.error("it has become too complex")
                if request.id.startswith("held"):
                    assert gate.opened.wait(60)
                super().push(token_id)

        return None if request.params.guide is None else Held()


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


@pytest.fixture
def house(gate: Gate) -> Iterator[Deployment]:
    made = deploy(make_guide=gate.guide, guides=GuideThreads(2, lambda: None))
    yield made
    made.coordinator.close()


def submit(house: Deployment, name: str, *, guided: bool, **params) -> list[Sequence]:
    guide = Guide.regex("a fake one's form") if guided else None
    asked = SamplingParams(guide=guide, **({"max_tokens": 12, "ignore_eos": True} | params))
    return house.coordinator.submit(Request(name, (5, 6, 7), asked, 0.0))


def run_until(house: Deployment, condition: Callable[[], bool]) -> None:
    """Take turns until it has come to that: however many, since threads get on by time."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        house.coordinator.step()
        house.coordinator.check()


def run(house: Deployment) -> None:
    run_until(house, lambda: not house.coordinator.has_work)


def test_a_row_sits_out_while_its_guide_is_followed_and_its_neighbours_go_on(
    house: Deployment, gate: Gate
):
    [held] = submit(house, "held", guided=True)
    [other], [free] = submit(house, "other", guided=True), submit(house, "free", guided=False)
    run_until(house, lambda: free.done)
    assert (len(held.output), held.state) == (1, State.DECODING)
    gate.opened.set()
    run(house)
    for sequence in held, other, free:
        assert sequence.output == expected(sequence)


@pytest.mark.parametrize("tokens", [1, 12])
def test_a_request_is_aborted_while_its_guide_is_followed(
    house: Deployment, gate: Gate, tokens: int
):
    [held] = submit(house, "held", guided=True, max_tokens=tokens)
    run_until(house, lambda: len(held.output) == 1)
    for _ in range(3):
        house.coordinator.step()
    assert not held.done  # whether its form is complete is not known
    house.coordinator.abort("held")
    assert held.state is State.ABORTED
    gate.opened.set()
    run(house)
    assert held.output == expected(held)[:1]


class Panic(BaseException):
    """What a library that is not written in Python may raise."""


@pytest.mark.parametrize("error", [ValueError, Panic])
def test_a_guide_that_breaks_ends_its_own_request_alone(
    house: Deployment, gate: Gate, error: type[BaseException]
):
    gate.error = error
    [bad], [free] = submit(house, "bad", guided=True), submit(house, "free", guided=False)
    run(house)
    assert bad.error is not None and "it has become too complex" in bad.error
    assert (bad.state, free.state) == (State.FAILED, State.FINISHED)


def test_choices_of_a_request_have_guides_of_their_own(house: Deployment):
    sequences = submit(house, "several", guided=True, n=3, seed=7)
    run(house)
    outputs = [sequence.output for sequence in sequences]
    assert outputs == list(map(expected, sequences)) and outputs[0] != outputs[1]


def test_nothing_is_begun_after_the_end(house: Deployment):
    house.coordinator.close()
    [late] = submit(house, "late", guided=True)
    run(house)
    assert late.state is State.FAILED
