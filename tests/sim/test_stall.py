"""A prefill policy that lets sequences wait for ever is told of."""

import logging

import pytest

from pdjax.config import Config
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.policies.registry import make_policies
from pdjax.sim.cluster import Cluster
from pdjax.sim.events import NothingToCome
from pdjax.workloads.synthetic import poisson


class Picky(FcfsPrefill):
    """Never plans a prompt of 200 tokens or more."""

    def plan(self, waiting, engines, now):
        return super().plan([each for each in waiting if each.length < 200], engines, now)


@pytest.mark.parametrize(("policy", "told"), [("fcfs", 0), (Picky, 1)])
def test_sequences_that_no_step_is_planned_for_are_told_of_once(policy, told, caplog):
    config = Config()
    cluster = Cluster(config, policies=make_policies(config, {"prefill": policy}))
    cluster.expect(poisson(rate=50.0, count=30, prompt=(50, 300), output=(1, 8)))
    with caplog.at_level(logging.WARNING, "pdjax"):
        if told:
            with pytest.raises(NothingToCome):
                cluster.run()
        else:
            cluster.run()
    assert len(caplog.records) == told
    assert all("policy Picky plans no step" in record.message for record in caplog.records)
