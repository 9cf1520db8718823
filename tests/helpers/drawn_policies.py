"""Policies of a random deployment, drawn by a chance of their own: a new one changes nothing else
of a workload."""

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

from pdjax.config import PoliciesConfig, RolesConfig
from pdjax.core.ids import EngineId
from pdjax.core.roles import Role
from pdjax.core.slo import SLO
from pdjax.host.policies.registry import POLICIES
from pdjax.host.policies.victims import VICTIMS
from pdjax.interfaces.engine import Engine


def drawn_policies(seed: int, happened: Counter[str]) -> PoliciesConfig:
    """In about every second role the default, else any that has a name; counts what was drawn."""
    chance = random.Random(f"policies in {seed}")
    chosen: dict[str, Any] = {
        role: chance.choice(list(names))
        for role, names in POLICIES.items()
        if chance.random() < 0.5
    }
    victim = chance.choice(list(VICTIMS))
    happened.update(f"{role} {name}" for role, name in (*chosen.items(), ("victim", victim)))
    return PoliciesConfig(victim=victim, tpot_target=chance.choice((None, None, 2.0)), **chosen)


def drawn_roles(seed: int) -> RolesConfig:
    """How engines of a workload drain, and what is borne of them."""
    chance = random.Random(f"roles in {seed}")
    return RolesConfig(
        interval=chance.choice((1.0, 4.0)),
        ttft_target=chance.choice((1.0, 20.0)),
        holds=chance.choice((1, 2)),
        pause=chance.choice((1.0, 10.0)),
        drain_deadline=chance.choice((None, 1.0, 20.0)),
        slow_ratio=chance.choice((None, 1.2)),
        failures=chance.choice((None, 1, 3)),
        retry_after=chance.choice((2.0, 20.0)),
    )


def drawn_options(name: str, seed: int) -> dict[str, Any]:
    """What policies may go by of a request of a workload."""
    chance = random.Random(f"options of {name} in {seed}")
    salts = random.Random(f"cache salt of {name} in {seed}")
    pins = random.Random(f"cache pin of {name} in {seed}")
    return {
        "cache_salt": salts.choice((None, None, None, "a", "b")),
        "cache_pin": pins.choice((None, None, None, 0.0, 5.0, 60.0)),
        "priority": chance.choice((0, 0, -1, 3)),
        "deadline": chance.choice((None, 10.0, 100.0)),
        "slo": chance.choice((None, None, SLO(ttft=5.0), SLO(ttft=30.0, tpot=3.0))),
        "labels": chance.choice(({}, {"tenant": "a"}, {"tenant": "b"}, {"user": "c"})),
    }


def starting_roles(
    engines: Iterable[Engine], seed: int, happened: Counter[str]
) -> dict[EngineId, Role]:
    """Roles at the start of engines that could have any; counts what was drawn."""
    chance = random.Random(f"roles in {seed}")
    roles = {engine.id: chance.choice(list(Role)) for engine in engines}
    happened.update(f"mixed engine for {role.value}" for role in roles.values())
    return roles
