"""Plans that are overtaken: between the layer groups of one engine's step, what another engine's
plan was made upon is lost, evicted, aborted or taken."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import Config, HandoffConfig, KVConfig
from pdjax.core.clock import VirtualClock
from pdjax.core.kv_layout import split_groups
from pdjax.core.request import Request, SamplingParams
from pdjax.host.coordinator import Coordinator
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.interfaces.transfer import Side
from tests.helpers.fake_transfer import FakeTransfer
from tests.helpers.fakes import (
    END_TOKEN,
    VOCAB,
    Chance,
    FakeDecodeEngine,
    FakePrefillEngine,
)
from tests.host.test_coordinator import CONFIG, LAYOUT, Deployment, expected

pytestmark = pytest.mark.smoke


def deployed(pages: int = 40, *, prefix_cache: bool = True, **handoff: Any) -> Deployment:
    """Two prefill engines, whose steps have two layer groups."""
    config = replace(
        CONFIG,
        kv=KVConfig(prefix_cache=prefix_cache),
        handoff=HandoffConfig(streaming=False, **handoff),
    )
    return with_engines(config, pages)


def with_engines(config: Config, pages: int) -> Deployment:
    chance = Chance(0, max_delay=0)
    groups = split_groups(LAYOUT.num_layers, 2)
    prefill = [FakePrefillEngine(LAYOUT, pages, chance, groups) for _ in range(2)]
    decode = [FakeDecodeEngine(LAYOUT, 40, config.decode.rows, chance)]
    transfer = FakeTransfer(prefill, decode, chance)
    clock = VirtualClock()
    recorder = Recorder(clock)
    coordinator = Coordinator(
        config,
        vocab_size=VOCAB,
        max_model_len=40,
        end_token_ids=[END_TOKEN],
        prefill_engines=prefill,
        decode_engines=decode,
        transfer=transfer,
        clock=clock,
        recorder=recorder,
    )
    return Deployment(coordinator, prefill, decode, transfer, clock, recorder)


def ask(house: Deployment, name: str, prompt: tuple[int, ...], max_tokens: int = 3) -> Sequence:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return house.coordinator.submit(Request(name, prompt, params, house.clock.now()))[0]


def during_a_step(
    house: Deployment, engine: int, then: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Have something happen after the first layer group of the next step of an engine."""
    prefill = house.prefill[engine].prefill

    def overtaken(batch, after_group):
        def after(group: int) -> None:
            after_group(group)
            if group == 0:
                then()

        monkeypatch.setattr(house.prefill[engine], "prefill", prefill)
        return prefill(batch, after)

    monkeypatch.setattr(house.prefill[engine], "prefill", overtaken)


class Undecided:
    """A landing whose end a test decides."""

    def __init__(self) -> None:
        self.fails = False

    def ready(self) -> bool:
        return self.fails

    def result(self) -> int:
        raise OSError("the device has gone")


def test_a_prefix_that_is_lost_while_another_engine_is_given_its_step(monkeypatch):
    house = deployed(give_back=True)
    landing, land = Undecided(), house.transfer.land

    def undecided_if_given_back(ticket, pages):
        back = ticket.shipment.target.side is Side.PREFILL
        return landing if back else land(ticket, pages)

    monkeypatch.setattr(house.transfer, "land", undecided_if_given_back)
    other = ask(house, "other", tuple(range(50, 60)))  # keeps engine 0 busy
    first = ask(house, "first", tuple(range(1, 9)), max_tokens=9)
    house.run_until(lambda: first.done and other.done)
    for _ in range(4):
        house.coordinator.step()
    assert first.home == 1

    def fail() -> None:
        landing.fails = True
        house.coordinator._land_transfers()

    during_a_step(house, 0, fail, monkeypatch)
    late = ask(house, "late", tuple(range(70, 77)))
    second = ask(house, "second", (*first.token_ids, 5, 6, 7))
    house.coordinator.step()
    assert landing.fails and second.state is State.WAITING
    monkeypatch.undo()
    house.run()
    assert [late.output, second.output] == [expected(late), expected(second)]
    assert second.cached_tokens < 16


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_sequence_that_is_preempted_while_another_engine_is_given_its_step(
    prefix_cache, monkeypatch
):
    """With its pages still cached it may go on from them at once."""
    house = deployed(prefix_cache=prefix_cache)
    a, b = (
        ask(house, name, tuple(range(first, first + 20))) for name, first in [("a", 1), ("b", 41)]
    )
    house.run_until(lambda: b.prefilled == 8)
    assert (a.engine, b.engine) == (0, 1)
    during_a_step(house, 0, lambda: house.coordinator._roster.preempt(b), monkeypatch)
    house.coordinator.step()
    assert b.epoch == 1
    assert (b.state is State.WAITING) != prefix_cache
    house.run()
    assert [a.output, b.output] == [expected(a), expected(b)]


def test_a_sequence_that_is_aborted_while_another_engine_is_given_its_step(monkeypatch):
    house = deployed()
    a, b = (
        ask(house, name, tuple(range(first, first + 20))) for name, first in [("a", 1), ("b", 41)]
    )
    house.run_until(lambda: b.prefilled == 8)
    during_a_step(house, 0, lambda: house.coordinator.abort("b"), monkeypatch)
    house.run()
    assert (b.state, a.output) == (State.ABORTED, expected(a))


@pytest.mark.parametrize("cached", [False, True])
def test_pages_that_are_taken_while_another_engine_is_given_its_step(cached, monkeypatch):
    """Free ones, and such as hold the known front of a prompt, which is evicted for them."""
    house = deployed(pages=11)
    prompt = tuple(range(1, 21))
    lane = house.coordinator._prefill[1]
    if cached:
        warm = [ask(house, "other", tuple(range(41, 51))), ask(house, "warm", prompt)]
        house.run_until(lambda: all(sequence.done for sequence in warm))
        assert warm[1].home == 1
    taken: list[int] = []
    during_a_step(
        house,
        0,
        lambda: taken.extend(lane.allocator.allocate(lane.allocator.free_pages)),
        monkeypatch,
    )
    a = ask(house, "a", tuple(range(61, 71)))
    b = ask(house, "b", prompt)
    house.coordinator.step()
    assert taken and b.state is State.WAITING
    lane.allocator.free(taken)
    house.run()
    assert [a.output, b.output] == [expected(a), expected(b)]
