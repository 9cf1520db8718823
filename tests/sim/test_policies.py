"""What policies are chosen for, on simulated engines: the same requests under two of them."""

import random
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from math import inf
from typing import Any

import pytest

from pdjax.config import Config, DecodeConfig, KVConfig, PoliciesConfig, PrefillConfig
from pdjax.core.kv_layout import KVLayout
from pdjax.core.request import Request, SamplingParams
from pdjax.host.policies.registry import POLICIES
from pdjax.sim.cluster import Cluster, Run
from pdjax.sim.costs import StepCosts
from pdjax.sim.links import Link

LAYOUT = KVLayout.of_heads(4, 2, 8, page_size=16, dtype="float32", itemsize=4)
COSTS = StepCosts(prefill_step=0.01, prefill_token=1e-3, tick=0.01, write=0.0)
FAST = Link(bandwidth=1e12, latency=0.0)


def served(
    requests: list[Request],
    prefill: int = 1,
    decode: int = 1,
    prefill_policy: str = "fcfs",
    decode_policy: str = "fcfs",
    costs: StepCosts = COSTS,
    **policies: Any,
) -> Run:
    """Prefill takes 1 ms a token; a step holds 256 tokens of up to 4 prompts."""
    config = Config(
        kv=KVConfig(page_size=16, prefix_cache=True),
        prefill=PrefillConfig(engines=prefill, pages=129, token_budget=256, max_sequences=4),
        decode=DecodeConfig(engines=decode, rows=8, pages=257),
        policies=PoliciesConfig(prefill=prefill_policy, decode=decode_policy, **policies),
        max_waiting=1000,
    )
    cluster = Cluster(config, LAYOUT, max_model_len=512, link=FAST, costs=costs)
    for request in requests:
        cluster.expect_request(request)
    run = cluster.run()
    cluster.coordinator.check()
    assert run.report["completed"] == len(requests)
    return run


def arrivals(rate: float, count: int, seed: int = 0):
    """Moments of independent arrivals."""
    chance, moment = random.Random(seed), 0.0
    for _ in range(count):
        moment += chance.expovariate(rate)
        yield moment


def ask(index: int, moment: float, prompt: tuple[int, ...], output: int = 4, **asked) -> Request:
    params = SamplingParams(temperature=0.0, seed=index, max_tokens=output, ignore_eos=True)
    return Request(f"r{index}", prompt, params, moment, **asked)


def started(run: Run) -> dict[str, float]:
    """When the prefill of each request began."""
    return {
        each.id.rpartition("#")[0]: next(at for name, at in each.marks if name == "prefill_started")
        for each in run.requests
    }


def mixed(count: int = 60, rate: float = 12.0) -> list[Request]:
    """Prompts of 10 to 400 tokens that share no prefix, most of them short."""
    chance = random.Random(1)
    return [
        ask(i, moment, (1 + i, *[1] * int(10 + 390 * chance.random() ** 3)))
        for i, moment in enumerate(arrivals(rate, count))
    ]


def conversations(count: int = 60, rate: float = 10.0) -> list[Request]:
    """Prompts that begin with one of twelve texts of 128 tokens."""
    chance = random.Random(2)
    return [
        ask(i, moment, (*[1 + chance.randrange(12)] * 128, 100 + i, *[9] * 40))
        for i, moment in enumerate(arrivals(rate, count))
    ]


@cache
def tokens_of_one_engine() -> Mapping[str, list[list[int]]]:
    return served(mixed()).tokens


@pytest.mark.parametrize("router", POLICIES["router"])
def test_a_router_serves_everybody_and_the_same_way_twice(router):
    first, again = (served(mixed(), 3, 2, router=router) for _ in range(2))
    assert first.to_json() == again.to_json()
    assert first.tokens == tokens_of_one_engine()
    busy = first.report["engines"]
    assert all(busy[f"prefill/{i}"]["steps"] for i in range(3))


def test_prefixes_are_found_where_the_router_looks_for_them():
    cached = {
        router: sum(
            each.cached_tokens for each in served(conversations(), 4, router=router).requests
        )
        for router in ("round_robin", "prefix_aware", "cost_based")
    }
    assert cached["prefix_aware"] > 1.5 * cached["round_robin"]
    assert cached["cost_based"] > 1.2 * cached["round_robin"]


def test_load_that_is_looked_at_waits_less():
    """Round robin sends a prompt behind a long one though another engine stands still."""
    ttft = {
        router: served(mixed(200, 24.0), 4, router=router).report["mean_ttft_ms"]
        for router in ("round_robin", "power_of_two", "least_loaded", "cost_based")
    }
    for router in ("power_of_two", "least_loaded", "cost_based"):
        assert ttft[router] < 0.97 * ttft["round_robin"]


def overloaded(count: int = 150, seed: int = 3) -> list[Request]:
    """More than one engine takes: 14 prompts a second, of 10 to 400 tokens; they have deadlines of
    1 to 6 s, or none, and classes of priority."""
    chance = random.Random(seed)
    return [
        ask(
            i,
            moment,
            (1 + i, *[1] * int(10 + 390 * chance.random() ** 3)),
            priority=chance.choice((-1, 0, 2)),
            deadline=chance.choice((None, 1 + 5 * chance.random())),
        )
        for i, moment in enumerate(arrivals(14.0, count, seed))
    ]


@cache
def under_load(policy: str, seed: int = 3) -> Run:
    return served(overloaded(seed=seed), prefill_policy=policy)


def patience(policy: str, request: Request, other: Request) -> float:
    """Seconds after a request within which another one must come to overtake it."""
    match policy:
        case "fcfs":
            return 0.0
        case "shortest_first":
            rate = PoliciesConfig().tokens_a_second
            return (len(request.prompt_token_ids) - len(other.prompt_token_ids)) / rate
        case "priority":
            return PoliciesConfig().seconds_a_class * (request.priority - other.priority)
    mine, theirs = (inf if each.deadline is None else each.deadline for each in (request, other))
    return 0.0 if mine == theirs else mine - theirs


@pytest.mark.parametrize("policy", ["fcfs", "shortest_first", "priority", "earliest_deadline"])
@pytest.mark.parametrize("seed", [3, 4])
def test_nobody_is_overtaken_after_a_bounded_time(policy, seed):
    requests = overloaded(seed=seed)
    begun, overtaken = started(under_load(policy, seed)), 0
    for request in requests:
        for later in requests:
            if request.arrival < later.arrival and begun[later.id] < begun[request.id]:
                overtaken += 1
                assert later.arrival - request.arrival <= patience(policy, request, later) + 1e-9
    assert bool(overtaken) == (policy != "fcfs")


def test_shortest_first_waits_less_in_the_mean():
    fcfs = under_load("fcfs")
    # Engines here prefill 1,000 tokens a second, not tens of thousands.
    shortest = served(overloaded(), prefill_policy="shortest_first", tokens_a_second=20.0)
    assert shortest.report["mean_ttft_ms"] < 0.7 * fcfs.report["mean_ttft_ms"]
    assert shortest.tokens == fcfs.tokens


def test_earliest_deadline_meets_more_deadlines():
    def met(policy: str) -> int:
        requests = {f"{each.id}#0": each for each in overloaded()}
        run = under_load(policy)
        asked = [(each.e2e, requests[each.id].deadline) for each in run.requests]
        return sum(
            took is not None and wanted is not None and took <= wanted for took, wanted in asked
        )

    assert met("earliest_deadline") > 1.3 * met("fcfs")


def test_classes_of_priority_wait_in_their_order():
    requests = {each.id: each for each in overloaded()}
    begun = started(under_load("priority"))
    waits: dict[int, list[float]] = {-1: [], 0: [], 2: []}
    for id, moment in begun.items():
        waits[requests[id].priority].append(moment - requests[id].arrival)
    urgent, plain, idle = (sum(each) / len(each) for each in waits.values())
    assert urgent < 0.5 * plain and plain < 0.7 * idle


@pytest.mark.parametrize("weights", [(), (("a", 3.0), ("b", 1.0))])
def test_tenants_get_their_shares(weights):
    """Tenant b asks for as much as a, in three times as many requests, and both for more than there
    is: while both have prompts waiting, what they have been served is in the ratio of weights."""
    requests = []
    for i in range(60):
        requests.append(ask(4 * i, 0.0, (1 + i, *[1] * 299), 2, labels={"tenant": "a"}))
        for j in range(1, 4):
            prompt = (1 + i, 1 + j, *[2] * 98)
            requests.append(ask(4 * i + j, 0.0, prompt, 2, labels={"tenant": "b"}))
    begun = started(served(requests, prefill_policy="fair", tenant_weights=weights))
    tokens = {"a": 0, "b": 0}
    left = {"a": 60, "b": 180}
    worst = 0.0
    ratio = 3.0 if weights else 1.0
    for request in sorted(requests, key=lambda each: begun[each.id]):
        tenant = request.labels["tenant"]
        tokens[tenant] += len(request.prompt_token_ids) + 2 * 2  # tokens of an answer count twice
        left[tenant] -= 1
        if not all(left.values()):
            break
        worst = max(worst, abs(tokens["a"] / ratio - tokens["b"]))
    # One prompt, and what the answers in the batch are charged: 2 tokens, each twice.
    assert worst <= 300 + 16 * 2 * 2
    assert min(tokens.values()) > 4000


def test_a_flood_of_one_tenant_does_not_hold_up_another():
    flood = [ask(i, 0.0, (1 + i, *[1] * 199), 2, labels={"user": "flood"}) for i in range(100)]
    rare = [
        ask(100 + i, 1.0 + 2 * i, (500 + i, *[1] * 99), 2, labels={"user": "rare"})
        for i in range(5)
    ]
    waits = {}
    for policy in ("fcfs", "fair"):
        begun = started(served([*flood, *rare], prefill_policy=policy))
        waits[policy] = max(begun[each.id] - each.arrival for each in rare)
    assert waits["fair"] < 1.0 < 10.0 < waits["fcfs"]


def test_a_target_for_tokens_limits_the_rows():
    """A tick takes 10 ms and 2 ms a row: 26 ms with all eight rows, and 18 with four."""
    costs = replace(COSTS, prefill_token=1e-4, tick_row=2e-3)
    requests = [ask(i, 0.02 * i, (1 + i, *[1] * 19), 40) for i in range(60)]
    free, held = (
        served(requests, costs=costs, tpot_target=target).report for target in (None, 0.019)
    )
    assert free["median_itl_ms"] > 24
    assert held["median_itl_ms"] < 19
    assert held["completed"] == 60
