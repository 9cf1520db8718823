"""What policies are chosen for, on simulated engines: the same requests under two of them."""

import random

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


def served(requests: list[Request], prefill: int = 1, decode: int = 1, **policies: str) -> Run:
    """Prefill takes 1 ms a token; a step holds 256 tokens of up to 4 prompts."""
    config = Config(
        kv=KVConfig(page_size=16, prefix_cache=True),
        prefill=PrefillConfig(engines=prefill, pages=129, token_budget=256, max_sequences=4),
        decode=DecodeConfig(engines=decode, rows=8, pages=257),
        policies=PoliciesConfig(**policies),
        max_waiting=1000,
    )
    cluster = Cluster(config, LAYOUT, max_model_len=512, link=FAST, costs=COSTS)
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


@pytest.mark.parametrize("router", POLICIES["router"])
def test_a_router_serves_everybody_and_the_same_way_twice(router):
    first, again = (served(mixed(), 3, 2, router=router) for _ in range(2))
    assert first.to_json() == again.to_json()
    assert first.tokens == served(mixed()).tokens
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
