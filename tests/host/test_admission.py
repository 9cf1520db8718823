"""Early rejection, on made-up queues and engines; and what becomes of a request that is shed."""

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
from pdjax.host.sequences.sequence import Sequence, State
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
    new = waiting if arrived is None else waiting[len(waiting) - arrived :]
    plan = EarlyRejection().shed(new, waiting, views, rows, now)
    return {each.sequence.order: each.cause for each in plan if isinstance(each, Shed)}


def test_everybody_is_admitted_where_nobody_is_refused():
    late = wanting(0, 10, deadline=1.0)
    assert AdmitAll().shed([late], [late], [prefill_view(prefill_times=MS)], [], 9.0) == []
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
    plan = EarlyRejection().shed(waiting, waiting, [prefill_view()], [decode_view()], 1.0)
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
            kv=KVConfig(page_size=16),
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
    requests = [asked(0, 0.0, 400), asked(1, 0.0, 400), asked(2, 0.01, deadline=0.3)]
    cluster = simulated(requests, "early_rejection")
    [late] = cluster.sequences["r2"]
    assert late.finish_reason == "shed"
    assert late.error == "deadline: its deadline of 0.3 s has passed before a first token"
    [metrics] = [each for each in cluster.recorder.requests() if each.id == "r2#0"]
    name, moment = metrics.marks[-1]
    assert name == "finished" and moment == pytest.approx(0.31) and metrics.shed


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
