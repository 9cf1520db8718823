"""Colocated replicas, and mixed steps on them, on a virtual clock."""

from dataclasses import replace

import numpy as np
import pytest

from pdjax.config import Config, DecodeConfig, KVConfig, PrefillConfig
from pdjax.interfaces.steps import StepKind
from pdjax.sim.cluster import Cluster, wiring
from pdjax.sim.costs import StepCosts
from pdjax.workloads.arrival import Arrival
from tests.sim.batches import decode_batch, prefill_batch
from tests.sim.test_cluster import LAYOUT, check_tokens

COSTS = StepCosts(prefill_token=1e-3, tick=0.1, write=0.0)


def replicas(count: int, mixed_budget: int | None, costs: StepCosts = COSTS) -> Cluster:
    config = Config(
        kv=KVConfig(page_size=16),
        prefill=PrefillConfig(
            engines=count, pages=65, token_budget=256, max_sequences=4, mixed_budget=mixed_budget
        ),
        decode=DecodeConfig(engines=count, rows=8, pages=129),
        colocated=True,
    )
    return Cluster(config, LAYOUT, max_model_len=512, **wiring(config, costs))


@pytest.mark.parametrize("mixed_budget", [None, 64])
def test_replicas_share_the_load_and_no_kv(mixed_budget):
    cluster = replicas(2, mixed_budget)
    cluster.expect([Arrival(0.01 * i, 100, 20) for i in range(12)])
    cluster.run()
    check_tokens(cluster)
    assert cluster.recorder.transfers.transfers == 0
    assert len({span.track for span in cluster.recorder.spans() if span.name == "tick"}) == 2
    kinds = {kind for engine in cluster.engines.values() for kind in engine.accepts}
    assert (StepKind.MIXED in kinds) == (mixed_budget is not None)


def test_a_long_prompt_holds_up_mixed_rows_by_its_chunks_alone():
    """A prefill step of 256 tokens is a gap of 256 ms in the stream; chunks of 64 are hidden by the
    tick of 100 ms, but for the row's own token."""
    gaps = []
    for budget in (None, 64):
        cluster = replicas(1, budget)
        cluster.expect([Arrival(0.0, 10, 40), Arrival(1.0, 500, 2)])
        [first] = [each for each in cluster.run().requests if each.output_tokens == 40]
        gaps.append(max(np.diff(first.token_times)))
    assert gaps[0] > 0.25
    assert gaps[1] == pytest.approx(0.1, abs=2e-3)


def test_costs_of_a_mixed_step():
    rows, few, many = decode_batch([[3, 7, -1]]), prefill_batch([20]), prefill_batch([200])
    assert COSTS.mixed_seconds(few, rows) == COSTS.tick  # the weights take longer than the tokens
    assert COSTS.mixed_seconds(many, rows) == pytest.approx(0.202)
    dear = replace(COSTS, tick_kv_token=1e-3)
    assert dear.mixed_seconds(many, rows) == pytest.approx(0.202 + 0.012)


def test_mixed_steps_are_known_as_gaps_between_tokens():
    """A policy that holds rows to a target would otherwise see ticks alone."""
    dear = replace(COSTS, prefill_token=1e-2)
    cluster = replicas(1, 64, dear)
    cluster.expect([Arrival(0.0, 10, 40), Arrival(1.0, 500, 2)])
    cluster.run()
    [state] = cluster.coordinator.loop.fleet
    gap, chunk = state.token_times.seconds(1), state.prefill_times.seconds(65)
    assert gap is not None and COSTS.tick < gap < 0.65
    assert chunk == pytest.approx(0.65, rel=0.1)
