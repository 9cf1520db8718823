"""Routers, on made-up engines."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import Config
from pdjax.host.policies.api import EngineView, PolicySetup, Router
from pdjax.host.policies.registry import POLICIES
from pdjax.host.policies.routers.cost_based import CostBased
from pdjax.host.policies.routers.power_of_two import PowerOfTwo
from pdjax.host.policies.routers.prefix_aware import PrefixAware
from pdjax.host.policies.routers.round_robin import RoundRobin
from pdjax.host.sequences.sequence import Sequence
from tests.helpers.views import decode_view, prefill_buckets, prefill_view, sequence, times

SETUP = PolicySetup(Config())


def prefills(router: Router, views: list[EngineView], prompts: int = 1, tokens: int = 8) -> list:
    """The engines that so many prompts go to, by their numbers."""
    return [number(router.prefill_engine(sequence(i, tokens), views)) for i in range(prompts)]


def decodes(router: Router, views: list[EngineView]) -> int:
    return number(router.decode_engine(sequence(0, 8), views))


def number(view: EngineView) -> int:
    return int(view.engine.partition("/")[2])


def holding(**tokens: int) -> Any:
    """Of each sequence so many tokens are cached."""

    def cached(sequence: Sequence) -> int:
        return tokens.get(sequence.request.id, 0)

    return cached


@pytest.mark.parametrize("name", POLICIES["router"])
def test_a_router_answers_with_one_of_the_engines_that_it_is_given(name):
    router = POLICIES["router"][name](SETUP)
    for count in (1, 2, 5):
        views = [prefill_view(i, backlog=i) for i in range(count)]
        assert all(router.prefill_engine(sequence(i, 8), views) in views for i in range(9))
        views = [decode_view(i, free_rows=1 + i % 4) for i in range(count)]
        assert all(router.decode_engine(sequence(i, 8), views) in views for i in range(9))


def test_engines_come_in_turn():
    router = RoundRobin()
    views = [prefill_view(i, backlog=9 - i) for i in range(3)]
    assert prefills(router, views, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert [decodes(router, [decode_view(i) for i in range(2)]) for _ in range(3)] == [0, 1, 0]


def test_an_engine_that_was_away_is_not_flooded():
    router, views = RoundRobin(), [prefill_view(i) for i in range(3)]
    assert prefills(router, views[:2], 20) == [0, 1] * 10
    assert prefills(router, views, 6) == [2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("name", ["least_loaded", "power_of_two", "prefix_aware"])
def test_a_replica_with_free_rows_prefills(name):
    """Of replicas, whose rows are in the pool where they prefill."""
    router = POLICIES["router"][name](SETUP)
    full = prefill_view(0, free_rows_of_pool=0)
    busy, free = (prefill_view(i, backlog=9, free_rows_of_pool=i) for i in (1, 2))
    assert prefills(router, [full, free]) == [2]
    assert prefills(router, [full, busy, free])[0] in ((1, 2) if name == "power_of_two" else (2,))
    # Where no row is free, and where none belongs to the pool, tokens to compute count.
    assert prefills(router, [full, prefill_view(1, backlog=9, free_rows_of_pool=0)]) == [0]
    assert prefills(router, [prefill_view(0), prefill_view(1, backlog=9)]) == [0]


def test_of_two_drawn_engines_the_better_is_taken():
    router = PowerOfTwo(SETUP)
    views = [prefill_view(i, backlog=i) for i in range(4)]
    chosen = Counter(prefills(router, views, 2000))
    # Engine i is the better one of a pair in (3 - i) of 6 pairs.
    assert [chosen[i] / 2000 for i in range(4)] == pytest.approx([1 / 2, 1 / 3, 1 / 6, 0], abs=0.05)


def test_chance_is_the_seeds_alone():
    views = [prefill_view(i, backlog=i) for i in range(8)]
    first = prefills(PowerOfTwo(SETUP), views, 50)
    again = PowerOfTwo(SETUP)
    decodes(again, [decode_view(i) for i in range(8)])  # what it was asked before is no matter
    assert prefills(again, views, 50) == first
    other = PowerOfTwo(PolicySetup(replace(Config(), seed=1)))
    assert prefills(other, views, 50) != first


def test_a_prompt_goes_where_its_prefix_is():
    views = [prefill_view(0), prefill_view(1, backlog=15, cached=holding(r0=4))]
    views.append(prefill_view(2, backlog=5, cached=holding(r0=4)))
    assert prefills(PrefixAware(SETUP), views, 2) == [
        2,
        0,
    ]  # of two with the prefix the less loaded


def test_a_prefix_is_computed_again_where_its_engine_is_swamped():
    for backlog, chosen in ((40, 1), (41, 0)):  # four steps of 10 tokens
        views = [prefill_view(0), prefill_view(1, backlog=backlog, cached=holding(r0=4))]
        assert prefills(PrefixAware(SETUP), views) == [chosen]


def test_decode_goes_where_pages_need_not_be_sent():
    views = [decode_view(0), decode_view(1, free_rows=3, cached=holding(r0=4))]
    assert decodes(PrefixAware(SETUP), views) == 1
    views = [decode_view(0), decode_view(1, free_rows=2, cached=holding(r0=4))]
    assert decodes(PrefixAware(SETUP), views) == 0


def test_the_first_to_be_done_is_chosen():
    slow, fast = times(0.0, 2e-3), times(0.0, 1e-3)
    busy = prefill_view(1, backlog=20, prefill_times=fast)
    # 8 tokens at 2 ms, against 28 at 1 ms; with 8 more waiting at the slow one it is 32 against 28.
    assert prefills(CostBased(), [prefill_view(0, prefill_times=slow), busy]) == [0]
    slower = prefill_view(0, backlog=8, prefill_times=slow)
    assert prefills(CostBased(), [slower, busy]) == [1]


def test_what_is_cached_costs_nothing():
    same = times(0.0, 1e-3)
    views = [prefill_view(0, backlog=3, prefill_times=same)]
    views.append(prefill_view(1, backlog=6, prefill_times=same, cached=holding(r0=4)))
    assert prefills(CostBased(), views, 2) == [1, 0]


def test_steps_count_beside_tokens():
    dear = times(0.05, 0.0)  # each step, however few its tokens
    views = [prefill_view(0, prefill_times=dear)]
    views.append(prefill_view(1, prefill_times=dear, buckets=prefill_buckets(budget=4)))
    assert prefills(CostBased(), views[::-1], tokens=9) == [0]


def test_an_engine_that_has_not_been_measured_is_tried():
    views = [prefill_view(0, backlog=4, prefill_times=times(0.0, 1e-3)), prefill_view(1)]
    assert prefills(CostBased(), views) == [1]
    assert prefills(CostBased(), [prefill_view(0, backlog=1), prefill_view(1)]) == [1]


def test_decode_goes_where_tokens_come_soonest():
    views = [
        decode_view(0, free_rows=3, token_times=times(0.02, 0.0)),
        decode_view(1, free_rows=1, token_times=times(0.005, 1e-3)),
    ]
    assert decodes(CostBased(), views) == 1
    steady = times(0.01, 0.0)  # a row more costs nothing: the emptiest
    views = [decode_view(i, free_rows=1 + i, token_times=steady) for i in range(3)]
    assert decodes(CostBased(), views) == 2
