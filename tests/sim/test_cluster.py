"""The production coordinator over simulated engines: what it does when, with what tokens."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from pdjax.config import Config, DecodeConfig, HandoffConfig, KVConfig, PrefillConfig
from pdjax.core.ids import EngineId, PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.core.request import Request, SamplingParams
from pdjax.sim.cluster import Cluster
from pdjax.sim.costs import StepCosts
from pdjax.sim.links import Link
from pdjax.sim.tokens import token_at
from pdjax.workloads.arrival import Arrival
from pdjax.workloads.chances import Arrivals, Gaps, Uniform, fixed
from pdjax.workloads.synthetic import Shape, closed_loop, conversations, poisson, regular

LAYOUT = KVLayout.of_heads(4, 2, 8, page_size=16, dtype="float32", itemsize=4)
COSTS = StepCosts(prefill_token=1e-3, tick=0.1, write=0.0)
FAST = Link(bandwidth=1e12, latency=0.0)


def cluster(prefill=1, decode=1, *, shared=0, rows=8, link=FAST, costs=COSTS, **options):
    """Prefill takes 1 ms a token and a tick 100 ms."""
    groups = options.pop("layer_groups", 2)
    config = Config(
        kv=KVConfig(page_size=16, prefix_cache=options.pop("prefix_cache", False)),
        prefill=PrefillConfig(
            engines=prefill,
            pages=options.pop("prefill_pages", 65),
            token_budget=options.pop("token_budget", 256),
            max_sequences=options.pop("max_sequences", 4),
        ),
        decode=DecodeConfig(engines=decode, rows=rows, pages=options.pop("decode_pages", 129)),
        handoff=HandoffConfig(layer_groups=groups),
        max_waiting=options.pop("max_waiting", 1000),
    )
    return Cluster(config, LAYOUT, shared=shared, max_model_len=512, link=link, costs=costs)


def check_tokens(served):
    """Every sequence has the tokens of its seed and its positions, and nothing is left behind."""
    served.coordinator.check()
    for sequences in served.sequences.values():
        for sequence in sequences:
            start = sequence.prompt_len
            positions = np.arange(start, start + sequence.max_new_tokens)
            seeds = np.full(len(positions), sequence.seed, np.uint32)
            expected = token_at(seeds, positions, served.vocab_size).tolist()
            assert sequence.output == expected, sequence.id


def test_moments_of_a_lone_request():
    served = cluster()
    served.expect([Arrival(1.0, 100, 4)])
    [metrics] = served.run().requests
    # Prefilled in 0.1 s, in two groups. The link takes next to nothing, and the first tick is
    # dispatched at once. A tick takes 0.1 s, and the next one is dispatched while it runs.
    assert metrics.ttft == pytest.approx(0.1)
    assert metrics.token_times == pytest.approx([1.1, 1.2, 1.3, 1.4], abs=1e-6)
    check_tokens(served)


def test_a_slow_link_holds_up_the_second_token_and_no_other():
    # 128 tokens of KV are 8 pages of 8,192 bytes; 4 layers in two groups.
    nbytes = 8 * LAYOUT.page_bytes
    served = cluster(link=Link(bandwidth=nbytes / 2.0, latency=0.25))
    served.expect([Arrival(0.0, 128, 3)])
    [metrics] = served.run().requests
    # The first group leaves at 0.064 s and takes 1.25 s; then the second does, as long.
    assert metrics.token_times == pytest.approx([0.128, 0.064 + 2.5 + 0.1, 0.064 + 2.5 + 0.2])
    check_tokens(served)


def test_the_same_run_twice_gives_the_same_bytes():
    def run(seed=0):
        served = cluster(3, 2, shared=1, rows=4)
        served.expect(poisson(rate=12.0, count=40, prompt=(5, 200), output=(1, 30), seed=seed))
        outcome = served.run()
        check_tokens(served)
        return outcome

    first, again, other = run(), run(), run(seed=1)
    assert first.to_json() == again.to_json()
    assert first.to_json() != other.to_json()
    assert first.report["completed"] == 40 and first.report["failed"] == 0
    assert first.events > first.turns / 4


@pytest.mark.parametrize(("prefill", "decode", "shared"), [(1, 1, 1), (2, 2, 2), (3, 2, 1)])
def test_shared_and_separate_pools_serve_together(prefill, decode, shared):
    served = cluster(prefill, decode, shared=shared, rows=4)
    served.expect(poisson(rate=15.0, count=40, prompt=(5, 200), output=(1, 30)))
    outcome = served.run()
    check_tokens(served)
    assert outcome.report["completed"] == 40
    pools = {engine.pool for engine in served.engines.values()}
    assert PoolId("hbm/0") in pools and len(pools) == prefill + decode - shared
    busy = outcome.report["engines"]
    assert all(busy[f"prefill/{i}"]["steps"] for i in range(prefill))
    assert all(busy[f"decode/{i}"]["steps"] for i in range(decode))


@pytest.mark.parametrize(
    "lost", [["prefill/0"], ["decode/1"], ["decode/0", "decode/1"], ["prefill/1", "decode/0"]]
)
@pytest.mark.parametrize("shared", [0, 1])
def test_requests_outlive_the_engines_that_served_them(lost, shared):
    def served(*losses):
        served = cluster(2, 2, shared=shared, rows=4)
        served.expect(poisson(rate=15.0, count=40, prompt=(5, 200), output=(2, 30)))
        for moment in losses:
            for name in lost:
                served.at(moment, lambda name=name: served.lose(EngineId(name)))
        return served

    whole, hurt = served().run(), served(1.0, 1.52)
    outcome = hurt.run()
    check_tokens(hurt)
    assert outcome.report["completed"] == 40
    assert outcome.tokens == whole.tokens
    assert any(metrics.preemptions for metrics in outcome.requests)


def test_a_full_queue_refuses_and_says_whom():
    served = cluster(max_waiting=2)
    served.expect(regular(0.0, [(100, 2)] * 5))
    outcome = served.run()
    assert outcome.refused == ("r2", "r3", "r4")
    assert outcome.report["completed"] == 2


def test_a_prefix_that_is_cached_costs_nothing():
    def ttfts(prefix_cache):
        served = cluster(prefix_cache=prefix_cache)
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        for i in range(2):
            served.expect_request(Request(f"r{i}", tuple(range(1, 201)), params, arrival=5.0 * i))
        return [metrics.ttft for metrics in served.run().requests]

    assert ttfts(False) == pytest.approx([0.2, 0.2])
    assert ttfts(True) == pytest.approx([0.2, 1e-3])  # of the last token alone


def test_one_engine_that_serves_one_prompt_a_step_is_a_queue():
    """Against Lindley's recursion exactly; its mean wait is within a tenth of the service time of
    what Pollaczek and Khinchine give for M/D/1 at half load: half a service time."""
    service, count = 0.1, 1200
    served = cluster(max_sequences=1, token_budget=100)
    arrivals = poisson(rate=0.5 / service, count=count, prompt=(100, 100), output=(1, 1), seed=3)
    served.expect(arrivals)
    requests = served.run().requests
    free, expected = 0.0, []
    for arrival in arrivals:
        free = max(free, arrival.moment) + service
        expected.append(free - arrival.moment)
    assert [metrics.ttft for metrics in requests] == pytest.approx(expected, abs=1e-6)
    waits = np.array(expected) - service
    assert waits.mean() == pytest.approx(0.5 * service, abs=0.1 * service)


def test_turns_of_a_conversation_come_when_the_answer_before_has_been_thought_over():
    served = cluster(prefix_cache=True)
    served.expect(
        conversations(
            Arrivals(1.0, math.inf),
            first=Shape(fixed(100), fixed(5)),
            later=Shape(fixed(20), fixed(4)),
            turns=fixed(3),
            count=2,
            think=Gaps(2.0),
        )
    )
    outcome = served.run()
    check_tokens(served)
    of = {metrics.id: metrics for metrics in outcome.requests}
    assert len(of) == 6 and outcome.refused == ()
    for session in ("s0", "s1"):
        for turn in (1, 2):
            before, now = (of[f"{session}t{number}#0"] for number in (turn - 1, turn))
            assert now.arrival == pytest.approx(before.token_times[-1] + 2.0, abs=1e-6)
            asked, answer = served.sequences[f"{session}t{turn - 1}"][0].request, outcome.tokens
            prompt = served.sequences[f"{session}t{turn}"][0].request.prompt_token_ids
            whole = (*asked.prompt_token_ids, *answer[f"{session}t{turn - 1}"][0])
            assert prompt[: len(whole)] == whole and len(prompt) == len(whole) + 20
            assert now.cached_tokens >= len(asked.prompt_token_ids) // 16 * 16 - 16


def test_clients_of_a_closed_loop_have_one_request_each_under_way():
    served = cluster()
    served.expect(closed_loop(3, Shape(fixed(30), Uniform(1, 9)), 20, Gaps(0.5, 1.0), seed=1))
    outcome = served.run()
    assert outcome.report["completed"] == 20 and outcome.report["max_concurrent_requests"] == 3


def test_turns_behind_a_refused_one_never_come():
    served = cluster(max_waiting=1, rows=1)
    served.expect([Arrival(0.0, 100, 30, id=name) for name in "abx"])
    served.expect([Arrival(0.0, 9, 1, id="v"), Arrival(1.0, 9, 1, id="y", after="v")])
    outcome = served.run()
    assert outcome.refused == ("b", "x", "v", "y")
    assert [metrics.id for metrics in outcome.requests] == ["a#0"]


def test_golden_run():
    """A small run of two engines of each kind, whose numbers change only on purpose."""
    served = cluster(2, 2, rows=4, layer_groups=4, link=Link(bandwidth=1e6, latency=1e-3))
    served.expect(poisson(rate=10.0, count=30, prompt=(5, 200), output=(1, 30), seed=7))
    outcome = served.run()
    check_tokens(served)
    report = outcome.report
    assert report["completed"] == 30
    golden = {
        "duration": 8.513394,
        "median_ttft_ms": 115.0,
        "p99_ttft_ms": 241.339516,
        "median_tpot_ms": 193.20784,
        "p99_tpot_ms": 1986.82408,
        "mean_e2el_ms": 3193.843871,
        "max_concurrent_requests": 19,
        "total_output_tokens": 549,
    }
    assert {key: report[key] for key in golden} == pytest.approx(golden, abs=1e-6)
    steps = {name: track["steps"] for name, track in report["engines"].items()}
    assert [steps[f"{kind}/{i}"] for kind in ("prefill", "decode") for i in (0, 1)] == [
        *(17, 13),
        *(82, 83),
    ]
    assert report["transfers"]["shipments"] == 56 and outcome.events == 363


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: cluster(1, 2, shared=2), "shared=2: must be between 0 and the numbers"),
        (
            lambda: Cluster(Config(kv=KVConfig(page_size=32)), LAYOUT),
            "page_size=32: must be that of the layout, 16",
        ),
        (
            lambda: Cluster(
                Config(decode=DecodeConfig(stages=2)), LAYOUT, shared=1, max_model_len=64
            ),
            "shared=1: needs one layout",
        ),
        (lambda: Arrival(-1.0, 1, 1), "moment=-1.0"),
        (lambda: Arrival(0.0, 0, 1), "prompt=0: must be at least 1"),
        (lambda: poisson(0.0, 1), "rate=0.0"),
    ],
)
def test_what_cannot_be_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_the_documented_example_runs(capsys):
    text = (Path(__file__).resolve().parents[2] / "docs/simulation.md").read_text("utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "docs/simulation.md", "exec"), {})
    assert 10 < float(capsys.readouterr().out) < 10_000
