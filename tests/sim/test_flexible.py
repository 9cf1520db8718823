"""Flexible engines, and prompts that are prefilled where they decode, on a virtual clock."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pdjax.config import Config, DecodeConfig, KVConfig, PoliciesConfig, PrefillConfig
from pdjax.core.slo import SLO
from pdjax.interfaces.steps import StepKind
from pdjax.sim.cluster import Cluster, Run
from pdjax.sim.costs import StepCosts
from pdjax.workloads.arrival import Arrival
from tests.sim.test_cluster import LAYOUT, check_tokens

COSTS = StepCosts(prefill_token=1e-4, tick=5e-3, tick_row=1e-4)


def flexible(
    which: str = "decode",
    prefills: int = 1,
    decodes: int = 1,
    budget: int = 64,
    costs: StepCosts = COSTS,
    **policies: Any,
) -> Cluster:
    config = Config(
        kv=KVConfig(page_size=16),
        prefill=PrefillConfig(
            engines=prefills, pages=129, token_budget=512, max_sequences=4, mixed_budget=budget
        ),
        decode=DecodeConfig(engines=decodes, rows=8, pages=257),
        flexible=which,
        policies=PoliciesConfig(**policies),
    )
    return Cluster(config, LAYOUT, max_model_len=512, costs=costs)


def played(cluster: Cluster, *arrivals: Arrival) -> Run:
    cluster.expect(arrivals)
    run = cluster.run()
    check_tokens(cluster)
    return run


def prefilled_on(cluster: Cluster) -> set[str]:
    return {span.track for span in cluster.recorder.spans() if span.name == "step"}


@pytest.mark.parametrize("which", ["none", "decode", "all"])
def test_engines_accept_what_the_config_says(which):
    config = Config(prefill=PrefillConfig(mixed_budget=None if which == "none" else 64))
    engines = Cluster(Config(flexible=which, prefill=config.prefill)).engines
    accepts = {id: engine.accepts for id, engine in engines.items()}
    every = frozenset(StepKind)
    assert accepts == {
        "prefill/0": every if which == "all" else {StepKind.PREFILL},
        "decode/0": {StepKind.DECODE} if which == "none" else every,
    }


@pytest.mark.parametrize("which", ["decode", "all"])
def test_roles_at_the_start_are_kept_by_remote_placement(which):
    cluster = flexible(which, 2, 2)
    played(cluster, *(Arrival(0.01 * i, 100, 20) for i in range(12)))
    assert prefilled_on(cluster) == {"prefill/0", "prefill/1"}
    assert cluster.recorder.transfers.transfers == 12


def test_short_prompts_are_prefilled_where_they_decode():
    cluster = flexible(placement="conditional", local_tokens=40)
    run = played(cluster, *(Arrival(0.1 * i, 30 if i % 2 else 200, 20) for i in range(12)))
    moved = {r.prompt_tokens for r in run.requests if r.transfer.transfers}
    assert moved == {200}
    assert run.report["prefills"] == {"local": 6, "remote": 6}
    where = {each["input_len"]: each["prefilled_locally"] for each in run.report["requests"]}
    assert where == {30: True, 200: False}
    assert cluster.recorder.transfers.transfers == 6


def burst(count: int = 16, tokens: int = 400) -> list[Arrival]:
    """Rows that decode for long, and then prompts all at once."""
    rows = [Arrival(0.05 * i, 20, 200) for i in range(2)]
    return rows + [Arrival(0.5, tokens, 4) for _ in range(count)]


def test_a_late_prefill_side_is_helped():
    late, helped = (
        played(flexible(placement=name, local_tokens=0), *burst())
        for name in ("remote", "conditional")
    )
    for which in ("p90_ttft_ms", "mean_ttft_ms"):
        assert helped.report[which] < 0.8 * late.report[which]
    assert helped.tokens == late.tokens


def test_prompts_of_one_length_are_shared_out_where_prefill_cannot_keep_up():
    arrivals = [Arrival(0.03 * i, 400, 4) for i in range(40)]  # a step of 400 takes 40 ms
    run = played(flexible(placement="conditional", local_tokens=0), *arrivals)
    late = played(flexible(), *arrivals)
    assert min(run.report["prefills"].values()) > 5
    assert run.report["p90_ttft_ms"] < 0.5 * late.report["p90_ttft_ms"]


def test_rows_keep_the_time_between_tokens_that_they_ask_for():
    """A tick of two rows takes 5.2 ms, a step of them and 512 prompt tokens 10.5. The first of
    these, and the one that is dispatched meanwhile, show what chunks cost."""
    costs, gaps = replace(COSTS, prefill_token=2e-5), {}
    for target in (None, 8e-3):
        policies: dict[str, Any] = {"placement": "conditional", "local_tokens": 512}
        cluster = flexible(budget=512, costs=costs, tpot_target=target, **policies)
        run = played(cluster, *burst(8, 500))
        [first, *_] = [each for each in run.requests if each.output_tokens == 200]
        gaps[target] = np.sort(np.diff(first.token_times))[::-1]
        assert "decode/0" in prefilled_on(cluster)
    assert (gaps[None][:4] > 9e-3).all()
    assert gaps[8e-3][2] == pytest.approx(8e-3, rel=0.05)  # of a line through what is no line


def test_rows_are_held_to_their_own_slo_too():
    cluster = flexible(placement="conditional", local_tokens=512)
    rows = [Arrival(0.0, 20, 200, slo=SLO(tpot=6e-3))]
    played(cluster, *rows, *(Arrival(0.5, 400, 2) for _ in range(6)))
    [first, *_] = cluster.so_far().requests
    assert first.tpot is not None and first.tpot < 6e-3


def test_the_same_run_twice_is_the_same():
    one, other = (
        played(flexible(placement="conditional", tpot_target=8e-3), *burst()) for _ in range(2)
    )
    assert one.to_json() == other.to_json()
