"""Policies of a random deployment, drawn by a chance of their own: a new one changes nothing else
of a workload."""

import random
from collections import Counter

from pdjax.config import PoliciesConfig
from pdjax.host.policies.registry import POLICIES


def drawn_policies(seed: int, happened: Counter[str]) -> PoliciesConfig:
    """In about every second role the default, else any that has a name; counts what was drawn."""
    chance = random.Random(f"policies in {seed}")
    chosen = {
        role: chance.choice(list(names))
        for role, names in POLICIES.items()
        if chance.random() < 0.5
    }
    happened.update(f"{role} {name}" for role, name in chosen.items())
    return PoliciesConfig(**chosen)
