"""Tiers of a random workload."""

import random

from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVLayout
from tests.helpers.fakes import FakePool

HOST, DISK = PoolId("host/0"), PoolId("disk/0")


def drawn_tiers(
    seed: int, below: random.Random, layout: KVLayout, has_tier: bool, *, lower: bool
) -> list[FakePool]:
    """A tier if there is to be one; or a small one, and another below it."""
    tier = FakePool(HOST, layout, 2 + below.randint(0, 30))
    if lower:
        draw = random.Random(f"lower tier in {seed}")
        sizes = {HOST: 3 + draw.randint(0, 7), DISK: 3 + draw.randint(0, 60)}
        return [FakePool(name, layout, size) for name, size in sizes.items()]
    return [tier] if has_tier else []
