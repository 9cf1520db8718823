"""Roles that change in a simulation: work that shifts from long prompts to long answers, and an
engine that becomes slow."""

from dataclasses import replace
from itertools import pairwise

import pytest

from pdjax.config import (
    Config,
    DecodeConfig,
    KVConfig,
    PoliciesConfig,
    PrefillConfig,
    RolesConfig,
)
from pdjax.core.ids import EngineId
from pdjax.core.request import Request, SamplingParams
from pdjax.core.roles import Role
from pdjax.core.slo import SLO
from pdjax.host.metrics.summary import summarize
from pdjax.host.service import Status
from pdjax.sim.cluster import Cluster, Run
from pdjax.sim.costs import StepCosts
from pdjax.workloads.arrival import Arrival

CONFIG = Config(
    flexible="all",
    kv=KVConfig(page_size=64),
    prefill=PrefillConfig(engines=2, token_budget=2048, mixed_budget=256),
    decode=DecodeConfig(engines=2, rows=8),
    max_waiting=1000,
)
COSTS = StepCosts(prefill_token=1 / 5000, tick=0.04)
PHASES = ((25.0, 5.8, 2048, 8), (50.0, 3.3, 256, 150))
"""Until when, requests a second, tokens of a prompt and of an answer: more than two engines
prefill, then more than two decode."""
PAUSE = 3.0


def shifting(policy: str) -> tuple[Cluster, Run]:
    roles = RolesConfig(interval=0.5, pause=PAUSE, holds=2)
    policies = PoliciesConfig(roles=policy)
    cluster = Cluster(
        replace(CONFIG, policies=policies, roles=roles), max_model_len=8192, costs=COSTS
    )
    moment, count = 0.0, 0
    for until, rate, prompt, answer in PHASES:
        while moment < until:
            tokens = tuple(1 + (7 * count + i) % 900 for i in range(prompt))
            params = SamplingParams(max_tokens=answer, ignore_eos=True)
            cluster.expect_request(Request(f"r{count}", tokens, params, moment))
            moment, count = moment + 1 / rate, count + 1
    return cluster, cluster.run()


def test_engines_go_where_the_work_is():
    slo = SLO(ttft=2.0, tpot=0.06)
    (fixed, kept), (cluster, moved) = shifting("fixed"), shifting("balance")
    assert moved.tokens == kept.tokens
    for run in (kept, moved):
        assert summarize(run.requests, slo)["completed"] == len(run.tokens)
    assert not fixed.recorder.duties
    changes = cluster.recorder.all_duties()
    early = [each.name for each in changes if each.start < PHASES[0][0]]
    late = [each.name for each in changes if each.start > PHASES[0][0]]
    assert early[0].endswith("prefill") and any(name.endswith("decode") for name in late)
    assert all(after.start - before.start >= PAUSE for before, after in pairwise(changes))
    assert len(changes) <= 7, "engines go back and forth"
    for each in {each.engine for each in changes}:
        toward = [c.name.rpartition(" ")[2] for c in changes if c.engine == each]
        assert len(toward) <= 3, f"{each} goes back and forth: {toward}"


@pytest.mark.parametrize("name", ["prefill/1", "decode/1"])
def test_a_slow_engine_drains_and_is_tried_again(name: str):
    roles = RolesConfig(interval=0.5, holds=2, slow_ratio=2.0, retry_after=4.0)
    policies = PoliciesConfig(router="round_robin")
    config = replace(CONFIG, roles=roles, policies=policies)
    cluster = Cluster(config, max_model_len=8192, costs=COSTS)
    slow = cluster.engines[EngineId(name)]
    state = cluster.coordinator.loop.fleet.engines[EngineId(name)]
    seen: list[tuple[float, Status]] = []

    def note() -> None:
        seen.append((cluster.clock.now(), state.service.status))

    costs = replace(COSTS, prefill_token=4 * COSTS.prefill_token, tick=4 * COSTS.tick)
    cluster.at(5.0, lambda: setattr(slow, "_costs", costs))
    cluster.at(20.0, lambda: setattr(slow, "_costs", COSTS))
    for i in range(90):
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        request = Request(f"r{i}", tuple(1 + (7 * i + j) % 900 for j in range(600)), params, i / 3)
        cluster.expect_request(request)
        cluster.at(i / 3, note)
    run = cluster.run()
    assert {each.finish_reason for each in run.requests} == {"length"}
    assert {status for moment, status in seen if moment < 5} == {Status.SERVING}
    assert Status.OUT in {status for _, status in seen}
    assert seen[-1][1] is Status.SERVING and state.role in (Role.PREFILL, Role.DECODE)
    assert any(each.cause.startswith("slow: its") for each in cluster.recorder.all_duties())


@pytest.mark.parametrize("roles", [RolesConfig(), RolesConfig(slow_ratio=2.0, interval=0.5)])
def test_a_gap_between_requests_outlasts_the_timers_of_the_host(roles: RolesConfig):
    config = replace(CONFIG, roles=roles, policies=PoliciesConfig(admission="early_rejection"))
    cluster = Cluster(config, max_model_len=8192, costs=COSTS)
    cluster.expect(
        [Arrival(0.0, 100, 4, id="a", deadline=2.0), Arrival(9.0, 100, 4, id="b", deadline=2.0)]
    )
    run = cluster.run()
    assert [each.finish_reason for each in run.requests] == ["length"] * 2
    assert run.seconds > 9
