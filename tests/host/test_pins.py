"""Pinned prefixes: none of their pages is evicted before its time, and they starve nobody."""

import random
from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import HandoffConfig, KVConfig
from pdjax.core.request import Request, SamplingParams
from pdjax.host.kv.pages import PageAllocator
from pdjax.host.kv.pins import PrefixPins
from pdjax.host.kv.pools import PoolState
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.events import Event
from tests.helpers.deployment import CONFIG, Deployment, deploy

KEPT = replace(CONFIG, kv=KVConfig(prefix_cache=True))
PROMPT = tuple(range(1, 11))  # two whole pages, and part of a third


def asked(
    deployment: Deployment, name: str, prompt: tuple[int, ...] = PROMPT, **options: Any
) -> Sequence:
    """A request, served to its end."""
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    request = Request(name, prompt, params, deployment.clock.now(), **options)
    [sequence] = deployment.coordinator.submit(request)
    deployment.run()
    return sequence


def crowd(deployment: Deployment) -> None:
    """Fill the pools with other prompts."""
    for number in range(12):
        asked(deployment, f"other {number}", (40 - number, *[7] * 12))


def pool_of(deployment: Deployment) -> PoolState:
    return deployment.state(deployment.prefill[0]).pool


def pinned(deployment: Deployment) -> int:
    pins = pool_of(deployment).pins
    assert pins is not None
    return pins.pages


def test_a_pinned_prompt_is_not_evicted():
    deployment = deploy(KEPT)
    assert asked(deployment, "a", cache_pin=60.0).finish_reason == "length"
    assert pinned(deployment) == 2
    crowd(deployment)
    assert asked(deployment, "again").cached_tokens >= 8


def test_without_a_pin_it_is():
    deployment = deploy(KEPT)
    asked(deployment, "a")
    crowd(deployment)
    assert asked(deployment, "again").cached_tokens == 0


def test_a_pin_ends_by_itself_and_by_a_request():
    deployment = deploy(KEPT)
    asked(deployment, "a", cache_pin=60.0)
    asked(deployment, "another", (9, *PROMPT), cache_pin=60.0)
    assert pinned(deployment) == 4
    asked(deployment, "again", cache_pin=0)
    assert pinned(deployment) == 2
    deployment.clock.advance(61.0)
    asked(deployment, "later", (8, *PROMPT))
    assert pinned(deployment) == 0
    deployment.coordinator.check()


def test_what_is_pinned_anew_is_pinned_longer():
    deployment = deploy(KEPT)
    asked(deployment, "a", cache_pin=60.0)
    deployment.clock.advance(40.0)
    asked(deployment, "b", cache_pin=60.0)
    deployment.clock.advance(40.0)
    asked(deployment, "c", (8, *PROMPT))
    assert pinned(deployment) == 2


def test_a_request_pins_once(monkeypatch):
    """Neither with each token where its sequences stay, nor for each choice, nor after it was
    preempted; and one timer serves all pins."""
    config = replace(KEPT, handoff=HandoffConfig(stay_below=100))
    deployment, timers = deploy(config), list[float]()
    at = deployment.events.at

    def noted(moment: float, event: Event) -> None:
        timers.append(moment)
        at(moment, event)

    monkeypatch.setattr(deployment.events, "at", noted)
    params = SamplingParams(max_tokens=20, ignore_eos=True, n=2)
    request = Request("a", PROMPT, params, deployment.clock.now(), cache_pin=60.0)
    first, _ = deployment.coordinator.submit(request)
    deployment.run_until(lambda: len(first.output) == 2)
    request = Request("b", PROMPT, SamplingParams(max_tokens=1), 0.0, cache_pin=0)
    [other] = deployment.coordinator.submit(request)
    deployment.run_until(lambda: other.done)
    assert pinned(deployment) == 0 and not first.done
    deployment.coordinator.loop.lifecycle.preempt(first)
    deployment.run()
    assert first.done and first.epoch == 1 and pinned(deployment) == 0
    for number in range(3):
        asked(deployment, f"r{number}", (20 + number, *PROMPT), cache_pin=70.0)
    pins = pool_of(deployment).pins
    assert pins is not None and (pins.totals.pinned, len(pins)) == (4, 3)
    assert len(timers) == 1


def test_pins_end_each_at_its_moment():
    deployment = deploy(KEPT)
    for number, seconds in enumerate((50.0, 20.0, 80.0, 20.0)):
        asked(deployment, f"r{number}", (20 + number, *PROMPT), cache_pin=seconds)
    left = []
    for _ in range(4):
        deployment.clock.advance(21.0)
        deployment.coordinator.step()
        left.append(pinned(deployment))
    assert left == [4, 4, 2, 0]


def test_pins_that_have_ended_refuse_no_other(monkeypatch):
    deployment = deploy(KEPT)
    monkeypatch.setattr(deployment.events, "at", lambda *timer: None)  # the timer is late
    pins = pool_of(deployment).pins
    assert pins is not None
    pins.most = 2
    asked(deployment, "a", cache_pin=60.0)
    deployment.clock.advance(61.0)
    asked(deployment, "b", (9, *PROMPT), cache_pin=60.0)
    assert (pins.totals.pinned, pins.totals.refused, pinned(deployment)) == (2, 0, 2)


def test_a_prompt_is_let_go_of_in_every_pool():
    deployment = deploy(KEPT, prefills=2)
    pools = [deployment.state(engine).pool for engine in deployment.prefill]
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    for name in ("a", "b"):
        request = Request(name, PROMPT, params, 0.0, cache_pin=60.0)
        deployment.coordinator.submit(request)
    deployment.run()
    assert [len(pool.pins or ()) for pool in pools] == [1, 1]
    asked(deployment, "c", cache_pin=0)
    assert [len(pool.pins or ()) for pool in pools] == [0, 0]


def test_pins_leave_room_for_the_longest_request():
    config = replace(KEPT, kv=KVConfig(prefix_cache=True, pinned_fraction=1.0))
    deployment = deploy(config, pages=(16, 40))  # of 15 pages the longest takes 10
    for number in range(4):
        asked(deployment, f"r{number}", (20 + number, *PROMPT), cache_pin=60.0)
    assert pinned(deployment) == 4
    pins = pool_of(deployment).pins
    assert pins is not None and (pins.totals.pinned, pins.totals.refused) == (2, 2)
    longest = asked(deployment, "longest", tuple(1 + i % 9 for i in range(38)))
    assert longest.finish_reason == "length"


@pytest.mark.parametrize(
    ("config", "prompt", "message"),
    [
        (CONFIG, PROMPT, "cache_pin=60.0: needs kv.prefix_cache=True"),
        (
            replace(KEPT, kv=KVConfig(prefix_cache=True, pinned_fraction=0.1)),
            tuple(range(1, 17)),
            "cache_pin=60.0: a prompt of 16 tokens; at most 15 may be pinned, by kv.pinned",
        ),
    ],
)
def test_what_can_never_be_pinned_is_refused(config, prompt, message):
    deployment = deploy(config)
    with pytest.raises(ValueError, match=message):
        asked(deployment, "a", prompt, cache_pin=60.0)
    assert asked(deployment, "b", prompt, cache_pin=0).finish_reason == "length"


def test_a_lost_pool_has_no_pins():
    deployment = deploy(KEPT)
    asked(deployment, "a", cache_pin=60.0)
    deployment.prefill[0].pages.losses += 1
    asked(deployment, "b", (8, *PROMPT))
    assert pinned(deployment) == 0
    deployment.coordinator.check()


def test_pages_are_conserved_through_random_pins():
    """Prefixes with pages in common, pinned, pinned anew, let go of and out of time."""
    draw = random.Random(3)
    allocator = PageAllocator(40)
    pins, held = PrefixPins(allocator, 12), allocator.allocate(30)
    allocator.know({page: place for place, page in enumerate(held)})
    made = refused = 0
    for now in range(400):
        length, first = draw.randint(1, 6), draw.choice((0, 4, 10, 20))
        pages, key = held[first : first + length], bytes([first, length])
        match draw.randrange(4):
            case 0:
                pins.unpin(key)
            case 1:
                pins.expire(now)
            case _:
                done = pins.pin(key, pages, now + draw.randint(1, 60))
                made, refused = made + done, refused + (not done)
        assert pins.pages == len(set(pins.held())) <= 12
        allocator.check([*held, *pins.held()])
    assert made > 50 < refused and pins.totals.pinned == made and pins.totals.refused == refused
    pins.clear()
    allocator.check(held)
    assert len(pins) == pins.pages == 0
