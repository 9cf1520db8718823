"""Early rejection, on made-up queues and engines; and what becomes of a request that is shed."""

import random
from collections import Counter
from dataclasses import replace
from math import inf
from typing import Any

import pytest

from pdjax.config import Config, DecodeConfig, KVConfig, PoliciesConfig, PrefillConfig
from pdjax.core.request import Request, SamplingParams
from pdjax.core.slo import SLO
from pdjax.host.policies.admission import AdmitAll, EarlyRejection
from pdjax.host.policies.api import AskAgain, EngineView, Shed
from pdjax.host.policies.registry import make_policies
from pdjax.host.sequences.queue import SequenceQueue
from pdjax.host.sequences.sequence import Sequence, State, age
from pdjax.host.step_times import StepTimes
from pdjax.sim.cluster import Cluster
from pdjax.sim.costs import StepCosts
from tests.helpers.deployment import CONFIG, deploy, expected
from tests.helpers.views import decode_view, prefill_view, sequence, times

MS = times(0.0, 1e-3)  # a millisecond a token or row


def wanting(order: int, tokens: int, *, new_tokens: int = 9, **asked: Any) -> Sequence:
    return sequence(order, tokens, new_tokens, asked=asked)


def shed(
    *waiting: Sequence,
    arrived: int | None = None,
    now: float = 0.0,
    prefill: list[EngineView] | None = None,
    decode: list[EngineView] | None = None,
) -> dict[int, str]:
    """Who is shed, and the cause; the last `arrived` of the queue are new, or all."""
    views = [prefill_view(prefill_times=MS)] if prefill is None else prefill
    rows = [decode_view(token_times=MS)] if decode is None else decode
    policy, queue = EarlyRejection(), SequenceQueue.of(waiting)
    cut = 0 if arrived is None else len(waiting) - arrived
    if before := waiting[:cut]:  # let in by an engine without any load
        fast = [prefill_view(prefill_times=times(0.0, 1e-9))], [decode_view(token_times=MS)]
        policy.shed(before, SequenceQueue.of(before), *fast, 0.0)
    plan = policy.shed(waiting[cut:], queue, views, rows, now)
    return {each.sequence.order: each.cause for each in plan if isinstance(each, Shed)}


def test_everybody_is_admitted_where_nobody_is_refused():
    late = wanting(0, 10, deadline=1.0)
    queue = SequenceQueue.of([late])
    assert AdmitAll().shed([late], queue, [prefill_view(prefill_times=MS)], [], 9.0) == []
    assert shed(sequence(0, 60)) == {}


def test_a_prompt_alone_in_time_and_behind_others_not():
    first, second = (wanting(i, 30, slo=SLO(ttft=0.05)) for i in range(2))
    assert shed(first, second) == {1: "overload"}
    # What is refused is not in the way of the next.
    third = wanting(2, 15, slo=SLO(ttft=0.05))
    assert shed(first, second, third) == {1: "overload"}


def test_backlogs_and_engines_count():
    asked = wanting(0, 20, slo=SLO(ttft=0.05))
    busy = prefill_view(0, backlog=40, prefill_times=MS)
    assert shed(asked, prefill=[busy]) == {0: "overload"}
    assert shed(asked, prefill=[busy, prefill_view(1, prefill_times=MS)]) == {}


def test_what_is_cached_is_not_counted():
    asked = wanting(0, 60, slo=SLO(ttft=0.03))
    assert shed(asked) == {0: "impossible"}
    assert shed(asked, prefill=[prefill_view(prefill_times=MS, cached=lambda _: 40)]) == {}


def test_time_that_has_passed_counts():
    asked = wanting(0, 20, slo=SLO(ttft=0.05))
    assert shed(asked, now=0.02) == {}
    assert shed(asked, now=0.04) == {0: "overload"}


def test_who_has_been_let_in_stays_but_for_a_deadline():
    slow, late = wanting(0, 30, slo=SLO(ttft=0.05)), wanting(1, 5, deadline=2.0)
    assert shed(slow, late, arrived=0, now=1.0) == {}
    assert shed(slow, late, arrived=0, now=2.0) == {1: "deadline"}
    late.output = [7]  # it has been preempted: a token was told
    assert shed(slow, late, arrived=0, now=2.0) == {}


def test_it_asks_again_at_the_first_deadline():
    waiting = [wanting(0, 5, deadline=3.0), wanting(1, 5, deadline=2.0), sequence(2, 5)]
    queue = SequenceQueue.of(waiting)
    plan = EarlyRejection().shed(waiting, queue, [prefill_view()], [decode_view()], 1.0)
    assert plan == [AskAgain(2.0)]


def test_without_a_measurement_everybody_is_let_in():
    asked = wanting(0, 60, slo=SLO(ttft=1e-6, tpot=1e-6), deadline=1e-6)
    assert shed(asked, prefill=[prefill_view()], decode=[decode_view()]) == {}


def test_steps_of_one_size_do_not_make_a_shorter_one_impossible():
    whole = StepTimes()
    for _ in range(300):
        whole.add(10, 0.1)
    views = [prefill_view(prefill_times=whole)]
    assert shed(wanting(0, 5, slo=SLO(ttft=0.05)), prefill=views) == {0: "overload"}
    assert shed(wanting(0, 10, slo=SLO(ttft=0.05)), prefill=views) == {0: "impossible"}


def test_tokens_that_come_too_far_apart():
    asked = wanting(0, 5, slo=SLO(tpot=0.002))
    assert shed(asked, decode=[decode_view(free_rows=3, token_times=MS)]) == {}
    full = decode_view(free_rows=2, token_times=MS)
    assert shed(asked, decode=[full]) == {0: "overload"}
    assert shed(asked, decode=[full, decode_view(1, token_times=MS)]) == {}
    assert shed(wanting(0, 5, slo=SLO(tpot=0.0005))) == {0: "impossible"}
    assert shed(wanting(0, 5, new_tokens=1, slo=SLO(tpot=0.0005))) == {}


def test_a_late_choice_whose_sibling_has_begun_stays_and_is_in_the_way():
    many = Request("many", (1,) * 30, SamplingParams(n=2, temperature=1.0), 0.0, deadline=1.0)
    begun, late = (Sequence(many, i, 0, order=i, max_new_tokens=9) for i in range(2))
    policy, fast = EarlyRejection(), [prefill_view(prefill_times=times(0.0, 1e-9))]
    policy.shed([begun, late], SequenceQueue.of([begun, late]), fast, [], 0.0)
    begun.state = State.PREFILLING
    new = sequence(2, 30, 9, arrival=2.0, asked={"slo": SLO(ttft=0.05)})
    views = [prefill_view(prefill_times=MS)]
    [refused] = policy.shed([new], SequenceQueue.of([late, new]), views, [], 2.0)
    assert isinstance(refused, Shed) and refused.sequence is new and refused.cause == "overload"
    # Preempted without a token, the first lets both be refused.
    begun.state = State.WAITING
    [refused] = policy.shed([], SequenceQueue.of([begun, late, new]), views, [], 2.0)
    assert isinstance(refused, Shed) and refused.cause == "deadline"


def plainly_shed(
    arrived: list[Sequence], waiting: list[Sequence], view: EngineView, now: float
) -> dict[str, str]:
    """By a walk over the whole queue: the requests that are refused, and the causes."""
    new, refused = {each.request.id for each in arrived}, dict[str, str]()
    for each in waiting:
        request = each.request
        choices = [other for other in waiting if other.request is request and not other.output]
        if request.id in refused or len(choices) < request.params.n:
            continue
        before = waiting[: waiting.index(each)]
        ahead = sum(other.length for other in before if other.request.id not in refused)
        predicted = now - request.arrival + (view.backlog + ahead + each.length) * 1e-3
        ttft = None if request.slo is None else request.slo.ttft
        most = min(inf if bound is None else bound for bound in (request.deadline, ttft))
        if request.deadline is not None and now >= request.arrival + request.deadline:
            refused[request.id] = "deadline"
        elif request.id in new and predicted > most:
            refused[request.id] = "impossible" if most < each.length * 1e-3 else "overload"
    return refused


@pytest.mark.parametrize("seed", range(40))
def test_it_refuses_what_a_walk_over_the_queue_would(seed):
    chance, policy, now, order = random.Random(seed), EarlyRejection(), 0.0, 0
    rank = chance.choice([age, lambda each: (each.request.priority, each.order)])
    queue = SequenceQueue()
    for turn in range(60):
        now += chance.choice((0.0, 0.001, 0.02))
        arrived = []
        for _ in range(chance.choice((0, 1, 1, 3))):
            n = chance.choice((1, 1, 3))
            request = Request(
                f"r{order}",
                (1,) * chance.randint(1, 60),
                SamplingParams(n=n, temperature=1.0),
                now,
                priority=chance.randint(-2, 2),
                deadline=chance.choice((None, 0.0205, 0.1005, 0.5005)),
                slo=chance.choice((None, SLO(ttft=0.0505), SLO(ttft=0.3005))),
            )
            for choice in range(n):
                arrived.append(Sequence(request, choice, 0, order=order, max_new_tokens=9))
                order += 1
        for each in arrived:
            queue.add(each, rank(each))
        view = prefill_view(prefill_times=MS, backlog=chance.randint(0, 50))
        wanted = plainly_shed(arrived, list(queue), view, now)
        plan = policy.shed(arrived, queue, [view], [], now)
        sheds = {each.sequence.request.id: each.cause for each in plan if isinstance(each, Shed)}
        assert sheds == wanted, turn
        whole = Counter(each.request for each in queue if not each.output)
        coming = [
            request.arrival + request.deadline
            for request, choices in whole.items()
            if choices == request.params.n and request.deadline and request.id not in sheds
        ]
        asked_at = [each.at for each in plan if isinstance(each, AskAgain)]
        assert all(now < at for at in asked_at) and len(asked_at) <= 1
        assert not coming or asked_at[0] <= min(coming)
        for each in list(queue):
            if each.request.id in sheds:
                queue.remove(each)
                each.state, each.done = State.SHED, True
        for each in list(queue)[: chance.choice((0, 0, 1, 2))]:  # begin
            queue.remove(each)
            each.state = State.PREFILLING
            if chance.random() < 0.7:
                each.output = [7]
            if chance.random() < 0.3:  # is preempted
                each.state = State.WAITING
                queue.add(each, rank(each))


# In the coordinator.


class ShedsNamed:
    """Refuses the requests that a test names."""

    sheds = True

    def __init__(self, *names: str) -> None:
        self.names = names

    def shed(self, arrived, waiting, prefill, decode, now):
        return [
            Shed(each, "overload", "as it was told")
            for each in arrived
            if each.request.id in self.names and not each.choice
        ]


def test_a_shed_request_ends_with_its_reason_and_nobody_else_does():
    policies = make_policies(CONFIG, {"admission": ShedsNamed("bad")})
    deployment = deploy(CONFIG, policies=policies)
    good, bad = (deployment.submit(name, prompt_len=4) for name in ("good", "bad"))
    deployment.run()
    assert good.output == expected(good)
    assert (bad.state, bad.finish_reason, bad.output) == (State.SHED, "shed", [])
    assert bad.error == "overload: as it was told"
    deployment.coordinator.check()


def test_all_choices_of_a_request_go_together():
    policies = make_policies(CONFIG, {"admission": ShedsNamed("many")})
    coordinator = deploy(CONFIG, policies=policies).coordinator
    request = Request("many", (1, 2), SamplingParams(n=3, temperature=1.0), 0.0)
    choices = coordinator.submit(request)
    while coordinator.has_work:
        coordinator.step()
    assert [each.finish_reason for each in choices] == ["shed"] * 3


def simulated(requests: list[Request], admission: str) -> Cluster:
    """Prefill takes 1 ms a token, and a tick 10 ms."""
    cluster = Cluster(
        Config(
            kv=KVConfig(page_size=16, prefix_cache=False),
            prefill=PrefillConfig(token_budget=256, max_sequences=4),
            decode=DecodeConfig(rows=8),
            policies=PoliciesConfig(admission=admission),
        ),
        max_model_len=512,
        costs=StepCosts(prefill_token=1e-3, tick=0.01, write=0.0),
    )
    for request in requests:
        cluster.expect_request(request)
    cluster.run()
    cluster.coordinator.check()
    return cluster


def asked(index: int, arrival: float, tokens: int = 100, **options: Any) -> Request:
    params = SamplingParams(temperature=0.0, seed=index, max_tokens=4, ignore_eos=True)
    return Request(f"r{index}", (1 + index, *[1] * (tokens - 1)), params, arrival, **options)


def test_overload_is_shed_counted_and_the_rest_is_in_time():
    """Twice the load that one engine takes."""
    slo = SLO(ttft=0.5)
    requests = [asked(i, 0.05 * i, 80 + i % 40, slo=slo) for i in range(200)]
    waited, rejected = (
        simulated(requests, admission).so_far() for admission in ("all", "early_rejection")
    )
    assert waited.report["completed"] == 200 and waited.report["shed"] == 0
    assert rejected.report["shed"] + rejected.report["completed"] == 200
    in_time = {
        name: sum(each.ttft is not None and each.ttft <= 0.5 for each in run.requests)
        for name, run in (("all", waited), ("early", rejected))
    }
    assert in_time["all"] < 30 < 85 < in_time["early"]
    # Of those let in nearly all: a prediction is none of the chunks that a step is cut into.
    assert in_time["early"] > 0.9 * rejected.report["completed"]


def test_a_deadline_that_passes_in_the_queue():
    requests = [asked(0, 0.0, 400), asked(1, 0.0, 400), asked(2, 0.01, deadline=0.2)]
    cluster = simulated(requests, "early_rejection")
    [late] = cluster.sequences["r2"]
    assert late.finish_reason == "shed"
    assert late.error == "deadline: its deadline of 0.2 s has passed before a first token"
    [metrics] = [each for each in cluster.recorder.requests() if each.id == "r2#0"]
    name, moment = metrics.marks[-1]
    assert name == "finished" and moment == pytest.approx(0.21) and metrics.shed


def test_who_came_before_a_measurement_is_judged_by_the_first():
    """The first step takes 0.256 s; what then waits in vain is refused at once."""
    slo = SLO(ttft=0.5)
    requests = [asked(0, 0.0, 400), *(asked(i, 0.0, 100, slo=slo) for i in range(1, 9))]
    cluster = simulated(requests, "early_rejection")
    reasons = [choices[0].finish_reason for choices in cluster.sequences.values()]
    assert reasons == ["length", "length", *["shed"] * 7]
    ends = {each.id: each.marks[-1][1] for each in cluster.recorder.requests()}
    assert [ends[f"r{i}#0"] for i in range(2, 9)] == pytest.approx([0.256] * 7)


def test_choices_whose_deadline_passes_end_alike():
    """Of the second request two choices begin at once and two after the deadline: all stay."""
    several = SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=4, ignore_eos=True)
    requests = [replace(asked(i, 0.0, deadline=0.2), params=several) for i in range(3)]
    cluster = simulated(requests, "early_rejection")
    begun = {
        each.id: dict(each.marks).get("prefill_started", inf)
        for each in cluster.recorder.requests()
    }
    assert [begun[f"r1#{choice}"] < 0.2 for choice in range(4)] == [True, True, False, False]
    reasons = [{each.finish_reason for each in choices} for choices in cluster.sequences.values()]
    assert reasons == [{"length"}, {"length"}, {"shed"}]


def test_choices_stay_after_one_has_ended():
    request = Request("many", (1, 2), SamplingParams(n=3, temperature=1.0), 0.0)
    coordinator = deploy(CONFIG).coordinator
    first, *others = coordinator.submit(request)
    lifecycle = coordinator.loop.lifecycle
    lifecycle.fail(first, ValueError("broken"))
    lifecycle.shed("many", "deadline: passed")
    assert [each.state for each in others] == [State.WAITING] * 2
    while coordinator.has_work:
        coordinator.step()
    assert [each.state for each in others] == [State.FINISHED] * 2


def test_an_impossible_slo_is_reported_as_such():
    requests = [asked(0, 0.0, 100), asked(1, 1.0, 200), asked(2, 2.0, 300, slo=SLO(ttft=0.1))]
    [third] = simulated(requests, "early_rejection").sequences["r2"]
    assert third.error == "impossible: slo.ttft=0.1 s, but its prompt alone takes 0.3 s"
