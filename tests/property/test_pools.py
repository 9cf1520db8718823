"""Random events over pools of pages, by every eviction policy: pages are conserved, none in use is
evicted, and what is found is what was written."""

import os
from collections import Counter

import pytest

from pdjax.config import Config, PoliciesConfig
from pdjax.core.recompute import RecomputeCost
from pdjax.host.policies.registry import POLICIES, make_policies
from tests.helpers.deployment import LAYOUT
from tests.host.test_prefix_index import Walk

EVENTS = int(os.environ.get("PDJAX_POOL_EVENTS", 12_000))
"""Over all policies; PDJAX_POOL_EVENTS=1000000 takes minutes."""
A_POOL = 300
"""Events of a pool."""


@pytest.mark.parametrize("name", POLICIES["eviction"])
def test_pages_are_conserved(name: str):
    policy = make_policies(Config(policies=PoliciesConfig(eviction=name))).eviction
    seen: Counter[str] = Counter()
    for seed in range(EVENTS // A_POOL // len(POLICIES["eviction"])):
        walk = Walk(seed, policy.order(LAYOUT, RecomputeCost(token=8.0, position=1.0)))
        for event in range(A_POOL):
            try:
                walk.step()
            except Exception as error:
                raise AssertionError(f"seed {seed}, event {event}: {error!r}") from error
        seen += walk.seen
        while walk.sequences:
            walk.leave()
        walk.allocator.check([])
        assert walk.allocate(walk.allocator.total) is not None, "all can be had again"
        assert len(walk.index) == 0
    for what in ("hits", "revived", "evicted", "refused", "duplicates"):
        assert seen[what] > 20, f"hardly walked through: {seen}"
