"""Policies, on made-up situations."""

from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import Config
from pdjax.core.ids import EngineId, PoolId
from pdjax.host.batching.buckets import Buckets
from pdjax.host.policies.api import EngineView, PolicySetup
from pdjax.host.policies.check import check_steps
from pdjax.host.policies.decode import FcfsDecode
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.policies.router import LeastLoaded
from pdjax.host.sequences.sequence import Sequence
from tests.helpers.views import (
    PREFILL_POOL,
    chunks,
    decode_view,
    prefill_buckets,
    prefill_view,
    sequence,
)

NOW = 0.0


def prefill_policy() -> FcfsPrefill:
    return FcfsPrefill(PolicySetup(Config(), LeastLoaded()))


def decode_policy() -> FcfsDecode:
    return FcfsDecode(PolicySetup(Config(), LeastLoaded()))


def test_prompts_are_packed_and_the_last_one_is_cut():
    waiting = [sequence(0, 4), sequence(1, 3), sequence(2, 9), sequence(3, 1)]
    [plan] = prefill_policy().plan(waiting, [prefill_view()], NOW)
    assert chunks(plan) == [(0, 0, 4), (1, 0, 3), (2, 0, 3)]


def test_what_is_cached_is_not_asked_where_there_is_no_room():
    """That may cost a walk over all pages of a prompt, at every step that it waits."""

    def cached(sequence: Sequence) -> int:
        raise AssertionError("asked in vain")

    views = [
        prefill_view(0, free_pages=1, cached=cached),
        prefill_view(1, total_pages=1, cached=cached),
        prefill_view(2, *[sequence(i, 9) for i in range(4)], cached=cached),
    ]
    plans = prefill_policy().plan([sequence(9, 9)], views, NOW)
    assert [plan.engine for plan in plans] == [EngineId("prefill/2")]


def test_what_has_begun_goes_on_first():
    begun = sequence(0, 9, prefilled=3)
    [plan] = prefill_policy().plan([sequence(1, 9)], [prefill_view(0, begun)], NOW)
    assert chunks(plan) == [(0, 3, 9), (1, 0, 4)]


def test_a_step_holds_so_many_sequences():
    waiting = [sequence(i, 1) for i in range(9)]
    step_view = prefill_view(buckets=prefill_buckets(sequences=3))
    [plan] = prefill_policy().plan(waiting, [step_view], NOW)
    assert len(plan.chunks) == 3


def test_a_step_reads_so_many_pages():
    # The last tokens of a long context: few to compute, but all of its 16 pages to read.
    long = sequence(0, 62, prefilled=60)
    step_view = prefill_view(0, long, buckets=prefill_buckets(step_pages=17))
    [plan] = prefill_policy().plan([sequence(1, 8), sequence(2, 4)], [step_view], NOW)
    assert chunks(plan) == [(0, 60, 62), (1, 0, 4)]


def test_pages_of_the_whole_prompt_must_be_free():
    waiting = [sequence(0, 16), sequence(1, 4)]
    assert prefill_policy().plan(waiting, [prefill_view(free_pages=3)], NOW) == []
    [plan] = prefill_policy().plan(waiting, [prefill_view(free_pages=4)], NOW)
    assert chunks(plan) == [(0, 0, 10)]


@pytest.mark.parametrize(
    ("changes", "put_off"),
    [
        ({"in_flight": 1, "leaving_pages": 2}, True),
        ({"in_flight": 0, "leaving_pages": 2}, False),  # the engine would stand still
        ({"in_flight": 1, "leaving_pages": 0}, False),  # nothing would come of it
        ({"in_flight": 1, "leaving_pages": 2, "running": (sequence(9, 8, prefilled=4),)}, False),
    ],
)
def test_a_step_is_put_off_that_could_soon_hold_more(changes, put_off):
    view = prefill_view(free_pages=1, buckets=prefill_buckets(budget=12), **changes)
    waiting = [sequence(0, 4), sequence(1, 5)]  # a page and two pages
    assert bool(prefill_policy().plan(waiting, [view], 0.0)) != put_off


def test_pages_are_not_promised_twice():
    waiting = [sequence(0, 4), sequence(1, 4)]
    [plan] = prefill_policy().plan(waiting, [prefill_view(free_pages=1)], NOW)
    assert chunks(plan) == [(0, 0, 4)]


def test_prefill_goes_to_the_engine_with_the_least_to_do():
    views = [prefill_view(0, backlog=5), prefill_view(1), prefill_view(2, open=False)]
    plans = prefill_policy().plan([sequence(0, 6), sequence(1, 1)], views, NOW)
    assert {plan.engine: chunks(plan) for plan in plans} == {
        "prefill/1": [(0, 0, 6)],
        "prefill/0": [(1, 0, 1)],
    }


def test_prefill_avoids_engines_that_can_never_hold_the_whole():
    views = [prefill_view(0, total_pages=3, free_pages=3), prefill_view(1, backlog=99)]
    [plan] = prefill_policy().plan([sequence(0, 6, new_tokens=8)], views, NOW)
    assert plan.engine == "prefill/1"


def test_growth_takes_free_pages_first():
    a, b = sequence(0, 4, pages=1), sequence(1, 4, pages=1)
    plan = decode_policy().grow([b, a], [a, b], 2, NOW)
    assert (plan.victims, plan.grown) == ((), (a, b))


def test_the_youngest_gives_way_to_the_oldest():
    a, b, c = (sequence(order, 4, pages=1) for order in range(3))
    plan = decode_policy().grow([a], [c, b, a], 0, NOW)
    assert (plan.victims, plan.grown) == ((c,), (a,))


def test_the_youngest_gives_way_even_if_it_is_the_one_in_need():
    a, b = sequence(0, 4, pages=2), sequence(1, 4, pages=1)
    plan = decode_policy().grow([b], [a, b], 0, NOW)
    assert (plan.victims, plan.grown) == ((b,), ())


def test_a_victim_serves_as_many_as_it_has_pages():
    a, b, c = sequence(0, 4, pages=1), sequence(1, 4, pages=1), sequence(2, 8, pages=2)
    plan = decode_policy().grow([a, b, c], [a, b, c], 0, NOW)
    assert (plan.victims, plan.grown) == ((c,), (a, b))


def admitted(policy: FcfsDecode, ready: list[Sequence], *views: EngineView) -> list[tuple]:
    plan = policy.admit(ready, views, NOW)
    return [(admission.sequence.order, admission.engine) for admission in plan]


def test_admission_counts_rows_and_pages():
    ready = [sequence(0, 5), sequence(1, 4), sequence(2, 4)]
    for changes, most in (({}, 3), ({"free_rows": 2}, 2), ({"free_pages": 4}, 2)):
        view = decode_view(rows_of_pool=0, **changes)
        assert admitted(decode_policy(), ready, view) == [(i, "decode/0") for i in range(most)]


@pytest.mark.parametrize("view", [decode_view(free_rows=0), decode_view(free_pages=1)])
def test_no_sequence_overtakes_the_oldest(view):
    ready = [sequence(0, 5), sequence(1, 1)]
    assert admitted(decode_policy(), ready, view) == []


def test_admission_leaves_a_page_in_hand_for_every_row_that_decodes():
    policy, ready = decode_policy(), [sequence(0, 8)]
    assert admitted(policy, ready, decode_view(free_rows=1, free_pages=4)) == []
    assert len(admitted(policy, ready, decode_view(free_rows=1, free_pages=5))) == 1
    assert len(admitted(policy, ready, decode_view(free_rows=4, free_pages=2))) == 1


def test_rows_of_other_engines_of_the_pool_count_too():
    policy, ready = decode_policy(), [sequence(0, 8)]
    assert admitted(policy, ready, decode_view(free_pages=4, rows_of_pool=3)) == []
    assert len(admitted(policy, ready, decode_view(free_pages=5, rows_of_pool=3))) == 1


def test_decode_goes_to_the_emptiest_engine_that_can_ever_hold_it():
    views = [
        decode_view(0, total_pages=3),
        decode_view(1, free_rows=1),
        decode_view(2, free_rows=2),
    ]
    ready = [sequence(0, 8, new_tokens=9)]
    assert admitted(decode_policy(), ready, *views) == [(0, "decode/2")]


def test_the_load_of_an_engine_is_the_share_of_its_rows():
    views = [decode_view(0, rows=8, free_rows=4), decode_view(1, rows=4, free_rows=3)]
    assert admitted(decode_policy(), [sequence(0, 8)], *views) == [(0, "decode/1")]


def test_an_engine_with_larger_pages_needs_fewer():
    views = [decode_view(0, free_pages=2), decode_view(1, page_size=8, free_pages=2)]
    assert admitted(decode_policy(), [sequence(0, 16)], *views) == [(0, "decode/1")]


def test_in_a_shared_pool_pages_stay_where_they_are():
    views = [decode_view(i, pool=PoolId(f"hbm/{i}"), free_pages=0) for i in range(2)]
    here = sequence(0, 8, pool=PoolId("hbm/1"))
    assert admitted(decode_policy(), [here], *views) == [(0, "decode/1")]


def test_a_sequence_stays_in_its_pool_while_there_is_a_row():
    here, there = decode_view(0, free_rows=1), decode_view(1)
    ready = [sequence(i, 8, pool=here.pool) for i in range(2)]
    there = replace(there, sources=frozenset({here.pool}))
    assert admitted(decode_policy(), ready, here, there) == [(0, "decode/0"), (1, "decode/1")]


def test_kv_comes_only_from_pools_that_are_connected():
    alone = decode_view(0, sources=frozenset({PoolId("hbm/decode-0")}))
    assert admitted(decode_policy(), [sequence(0, 8)], alone) == []
    assert admitted(decode_policy(), [sequence(0, 8)], alone, decode_view(1)) == [(0, "decode/1")]


def test_room_ahead_is_for_those_first_whose_prefill_has_ended():
    streaming, views = [sequence(1, 8)], [decode_view()]
    assert len(decode_policy().admit_ahead(streaming, [], views, NOW)) == 1
    assert decode_policy().admit_ahead(streaming, [sequence(0, 8)], views, NOW) == []


class Served:
    """A prefill engine that does at once what is planned for it; how long each sequence waits."""

    def __init__(self, buckets: Buckets, decoding: int, length: int = 4) -> None:
        self.policy, self.buckets, self.steps, self.submitted = (
            prefill_policy(),
            buckets,
            0,
            decoding,
        )
        self.running = [
            sequence(i, length, 60, output=[1], prefilled=length) for i in range(decoding)
        ]
        self.waiting: list[Sequence] = []
        self.last: dict[Sequence | str, int] = dict.fromkeys([*self.running, "prompt"], 0)
        self.longest = {"decoding": 0, "prompt": 0}

    def submit(self, tokens: int) -> None:
        self.waiting.append(sequence(self.submitted, tokens))
        self.submitted += 1

    def step(self) -> None:
        room: dict[str, Any] = {"free_pages": 99, "total_pages": 99}
        view = prefill_view(0, *self.running, steps=self.steps, buckets=self.buckets, **room)
        self.steps += 1
        for plan in self.policy.plan(self.waiting, [view], NOW):
            for chunk in plan.chunks:
                self._serve(chunk.sequence, chunk.stop)
        for each in self.last:
            kind = "prompt" if each == "prompt" else "decoding"
            # How many steps it takes from one to the next, that one included.
            waits = self.steps + 1 - self.last[each]
            self.longest[kind] = max(self.longest[kind], waits)

    def _serve(self, each: Sequence, stop: int) -> None:
        if each in self.waiting:
            self.waiting.remove(each)
            self.running.append(each)
        each.prefilled, each.served = stop, self.steps
        self.last[each if each.output else "prompt"] = self.steps
        if stop == each.length and each.output:
            each.output[0] = 1  # decodes for ever, at one and the same length
            each.prefilled -= 1
        elif stop == each.length:
            self.running.remove(each)


@pytest.mark.parametrize("places", [1, 2, 3, 8])
@pytest.mark.parametrize("decoding", [1, 2, 5, 9, 20])
@pytest.mark.parametrize("budget", [1, 3, 16])
@pytest.mark.parametrize("prompts", [False, True])
def test_sequences_that_decode_where_they_were_prefilled_are_served_in_turn(
    places, decoding, budget, prompts
):
    engine = Served(prefill_buckets(budget, places, step_pages=64), decoding)
    for _ in range(200):
        while prompts and len(engine.waiting) < 3:
            engine.submit(tokens=40)
        engine.step()
    at_once = min(places, budget)
    rounds = -(-decoding // at_once)
    assert engine.longest["decoding"] <= rounds * (2 if prompts else 1)
    assert engine.longest["prompt"] <= 2 or not prompts


@pytest.mark.parametrize("places", [1, 2, 8])
def test_not_even_pages_keep_a_sequence_from_its_turn(places):
    """A step can read the pages of one context, which each of these needs by itself."""
    engine = Served(prefill_buckets(16, places, step_pages=16), decoding=3, length=63)
    for _ in range(100):
        while len(engine.waiting) < 3:
            engine.submit(tokens=60)
        engine.step()
    assert engine.longest["decoding"] <= 2 * 3
    assert engine.longest["prompt"] <= 2


def test_more_short_prompts_than_places_all_get_on():
    """Of 8 that decode where they were prefilled no half stands still."""
    engine = Served(prefill_buckets(512, 8, step_pages=64), decoding=8)
    for _ in range(20):
        engine.step()
    assert engine.longest["decoding"] == 1


def test_engines_that_share_a_pool_share_its_free_pages():
    views = [prefill_view(i, pool=PREFILL_POOL, free_pages=5) for i in range(2)]
    waiting = [sequence(i, 8) for i in range(4)]
    plans = prefill_policy().plan(waiting, views, NOW)
    check_steps(FcfsPrefill, plans, views, 0.0)
    assert sorted(seq for plan in plans for seq, _, _ in chunks(plan)) == [0, 1]  # 2 pages each
