"""Policies, on made-up situations."""

import pytest

from pdjax.config import DecodeConfig, PrefillConfig
from pdjax.core.request import Request, SamplingParams
from pdjax.host.batching.buckets import Buckets
from pdjax.host.policies.api import DecodeView, PrefillPlan, PrefillView
from pdjax.host.policies.decode import FcfsDecode
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.policies.router import LeastLoaded
from pdjax.host.sequences.sequence import Sequence

pytestmark = pytest.mark.smoke

NOBODY: frozenset[int] = frozenset()


def sequence(order: int, tokens: int, new_tokens: int = 1, pages: int = 0, **state) -> Sequence:
    request = Request(f"r{order}", (1,) * tokens, SamplingParams(), 0.0)
    made = Sequence(request, 0, 0, order=order, max_new_tokens=new_tokens, **state)
    made.pages = list(range(1, pages + 1))
    return made


def prefill_scheduler(budget: int = 10, sequences: int = 4, step_pages: int = 16) -> FcfsPrefill:
    config = PrefillConfig(token_budget=budget, max_sequences=sequences, page_buckets=(step_pages,))
    return FcfsPrefill(
        Buckets.of(config, DecodeConfig(), page_size=4, max_model_len=64), budget, LeastLoaded()
    )


def decode_scheduler() -> FcfsDecode:
    buckets = Buckets.of(PrefillConfig(), DecodeConfig(), page_size=4, max_model_len=64)
    return FcfsDecode(buckets, LeastLoaded())


def prefill_view(engine: int = 0, *running: Sequence, **changes) -> PrefillView:
    values = {"open": True, "backlog": 0, "free_pages": 20, "total_pages": 20, **changes}
    values.setdefault("cached", lambda sequence: 0)
    return PrefillView(engine=engine, running=running, **values)


def decode_view(engine: int = 0, **changes) -> DecodeView:
    values = {"rows": 4, "free_rows": 4, "free_pages": 20, "total_pages": 20, **changes}
    return DecodeView(engine=engine, **{"shares_with": NOBODY, **values})


def chunks(plan: PrefillPlan) -> list[tuple[int, int, int]]:
    return [(chunk.sequence.order, chunk.start, chunk.stop) for chunk in plan.chunks]


def test_prompts_are_packed_and_the_last_one_is_cut():
    waiting = [sequence(0, 4), sequence(1, 3), sequence(2, 9), sequence(3, 1)]
    [plan] = prefill_scheduler().plan(waiting, [prefill_view()])
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
    plans = prefill_scheduler().plan([sequence(9, 9)], views)
    assert [plan.engine for plan in plans] == [2]


def test_what_has_begun_goes_on_first():
    begun = sequence(0, 9, prefilled=3)
    [plan] = prefill_scheduler().plan([sequence(1, 9)], [prefill_view(0, begun)])
    assert chunks(plan) == [(0, 3, 9), (1, 0, 4)]


def test_a_step_holds_so_many_sequences():
    waiting = [sequence(i, 1) for i in range(9)]
    [plan] = prefill_scheduler(sequences=3).plan(waiting, [prefill_view()])
    assert len(plan.chunks) == 3


def test_a_step_reads_so_many_pages():
    # The last tokens of a long context: few to compute, but all of its 16 pages to read.
    long = sequence(0, 62, prefilled=60)
    scheduler = prefill_scheduler(step_pages=17)
    [plan] = scheduler.plan([sequence(1, 8), sequence(2, 4)], [prefill_view(0, long)])
    assert chunks(plan) == [(0, 60, 62), (1, 0, 4)]


def test_pages_of_the_whole_prompt_must_be_free():
    waiting = [sequence(0, 16), sequence(1, 4)]
    assert prefill_scheduler().plan(waiting, [prefill_view(free_pages=3)]) == []
    [plan] = prefill_scheduler().plan(waiting, [prefill_view(free_pages=4)])
    assert chunks(plan) == [(0, 0, 10)]


def test_pages_are_not_promised_twice():
    waiting = [sequence(0, 4), sequence(1, 4)]
    [plan] = prefill_scheduler().plan(waiting, [prefill_view(free_pages=1)])
    assert chunks(plan) == [(0, 0, 4)]


def test_prefill_goes_to_the_engine_with_the_least_to_do():
    views = [prefill_view(0, backlog=5), prefill_view(1), prefill_view(2, open=False)]
    plans = prefill_scheduler().plan([sequence(0, 6), sequence(1, 1)], views)
    assert {plan.engine: chunks(plan) for plan in plans} == {1: [(0, 0, 6)], 0: [(1, 0, 1)]}


def test_prefill_avoids_engines_that_can_never_hold_the_whole():
    views = [prefill_view(0, total_pages=3, free_pages=3), prefill_view(1, backlog=99)]
    [plan] = prefill_scheduler().plan([sequence(0, 6, new_tokens=8)], views)
    assert plan.engine == 1


def test_growth_takes_free_pages_first():
    a, b = sequence(0, 4, pages=1), sequence(1, 4, pages=1)
    plan = decode_scheduler().grow([b, a], [a, b], free_pages=2)
    assert (plan.victims, plan.grown) == ((), (a, b))


def test_the_youngest_gives_way_to_the_oldest():
    a, b, c = (sequence(order, 4, pages=1) for order in range(3))
    plan = decode_scheduler().grow([a], [c, b, a], free_pages=0)
    assert (plan.victims, plan.grown) == ((c,), (a,))


def test_the_youngest_gives_way_even_if_it_is_the_one_in_need():
    a, b = sequence(0, 4, pages=2), sequence(1, 4, pages=1)
    plan = decode_scheduler().grow([b], [a, b], free_pages=0)
    assert (plan.victims, plan.grown) == ((b,), ())


def test_a_victim_serves_as_many_as_it_has_pages():
    a, b, c = sequence(0, 4, pages=1), sequence(1, 4, pages=1), sequence(2, 8, pages=2)
    plan = decode_scheduler().grow([a, b, c], [a, b, c], free_pages=0)
    assert (plan.victims, plan.grown) == ((c,), (a, b))


def test_admission_reserves_a_row_and_all_pages():
    ready = [sequence(0, 5), sequence(1, 4)]
    admissions = decode_scheduler().admit(ready, [decode_view()])
    assert [(a.sequence.order, a.engine, a.pages) for a in admissions] == [(0, 0, 2), (1, 0, 1)]


@pytest.mark.parametrize("view", [decode_view(free_rows=0), decode_view(free_pages=1)])
def test_nobody_overtakes_the_oldest(view):
    ready = [sequence(0, 5), sequence(1, 1)]
    assert decode_scheduler().admit(ready, [view]) == []


def test_admission_leaves_a_page_in_hand_for_everybody_who_decodes():
    scheduler, ready = decode_scheduler(), [sequence(0, 8)]
    assert scheduler.admit(ready, [decode_view(free_rows=1, free_pages=4)]) == []
    assert len(scheduler.admit(ready, [decode_view(free_rows=1, free_pages=5)])) == 1
    assert len(scheduler.admit(ready, [decode_view(free_rows=4, free_pages=2)])) == 1


def test_decode_goes_to_the_emptiest_engine_that_can_ever_hold_it():
    views = [
        decode_view(0, total_pages=3),
        decode_view(1, free_rows=1),
        decode_view(2, free_rows=2),
    ]
    [admission] = decode_scheduler().admit([sequence(0, 8, new_tokens=9)], views)
    assert admission.engine == 2


def test_in_a_shared_pool_pages_stay_where_they_are():
    views = [decode_view(i, shares_with=frozenset({i}), free_pages=0) for i in range(2)]
    [admission] = decode_scheduler().admit([sequence(0, 8, engine=1)], views)
    assert (admission.engine, admission.pages) == (1, 0)


class Served:
    """A prefill engine that does at once what is planned for it, and how long everybody waits."""

    def __init__(self, scheduler: FcfsPrefill, decoding: int, length: int = 4) -> None:
        self.scheduler, self.steps, self.submitted = scheduler, 0, decoding
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
        view = prefill_view(0, *self.running, steps=self.steps, free_pages=99, total_pages=99)
        self.steps += 1
        for plan in self.scheduler.plan(self.waiting, [view]):
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
def test_whoever_decodes_where_it_was_prefilled_is_served_in_turn(
    places, decoding, budget, prompts
):
    house = Served(prefill_scheduler(budget, places, step_pages=64), decoding)
    for _ in range(200):
        while prompts and len(house.waiting) < 3:
            house.submit(tokens=40)
        house.step()
    at_once = min(places, budget)
    rounds = -(-decoding // at_once)
    assert house.longest["decoding"] <= rounds * (2 if prompts else 1)
    assert house.longest["prompt"] <= 2 or not prompts


@pytest.mark.parametrize("places", [1, 2, 8])
def test_not_even_pages_keep_anybody_from_his_turn(places):
    """A step can read the pages of one context, which each of these needs by itself."""
    house = Served(prefill_scheduler(16, places, step_pages=16), decoding=3, length=63)
    for _ in range(100):
        while len(house.waiting) < 3:
            house.submit(tokens=60)
        house.step()
    assert house.longest["decoding"] <= 2 * 3
    assert house.longest["prompt"] <= 2


def test_more_short_prompts_than_places_all_get_on():
    """Of 8 that decode where they were prefilled no half stands still."""
    house = Served(prefill_scheduler(512, 8, step_pages=64), decoding=8)
    for _ in range(20):
        house.step()
    assert house.longest["decoding"] == 1
