"""Policies by name, as "module:Class", as a class, or as an object."""

from collections.abc import Mapping
from importlib import import_module
from inspect import get_annotations, isfunction
from typing import Any, get_type_hints

from pdjax.config import Config
from pdjax.core.messages import one_line, shown
from pdjax.host.policies.admission import AdmitAll, EarlyRejection
from pdjax.host.policies.api import Policies, PolicySetup
from pdjax.host.policies.decode import FcfsDecode
from pdjax.host.policies.evictions.aged import CostAware, Lfu
from pdjax.host.policies.evictions.lru import Lru, PrefixLru
from pdjax.host.policies.handoff import HandoffRules
from pdjax.host.policies.orders.earliest_deadline import (
    EarliestDeadlineDecode,
    EarliestDeadlinePrefill,
)
from pdjax.host.policies.orders.fair import FairPrefill
from pdjax.host.policies.orders.prefill_order import PrefillOrderDecode
from pdjax.host.policies.orders.priority import PriorityDecode, PriorityPrefill
from pdjax.host.policies.orders.shortest_first import ShortestFirstDecode, ShortestFirstPrefill
from pdjax.host.policies.placement import ConditionalPlacement, RemotePlacement
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.policies.roles import BalanceRoles, FixedRoles
from pdjax.host.policies.router import LeastLoaded
from pdjax.host.policies.routers.cost_based import CostBased
from pdjax.host.policies.routers.power_of_two import PowerOfTwo
from pdjax.host.policies.routers.prefix_aware import PrefixAware
from pdjax.host.policies.routers.round_robin import RoundRobin
from pdjax.host.policies.tiering import AlwaysLoad, LoadByCost

POLICIES: dict[str, dict[str, Any]] = {
    "prefill": {
        "fcfs": FcfsPrefill,
        "shortest_first": ShortestFirstPrefill,
        "earliest_deadline": EarliestDeadlinePrefill,
        "priority": PriorityPrefill,
        "fair": FairPrefill,
    },
    "decode": {
        "fcfs": FcfsDecode,
        "shortest_first": ShortestFirstDecode,
        "earliest_deadline": EarliestDeadlineDecode,
        "priority": PriorityDecode,
        "prefill_order": PrefillOrderDecode,
    },
    "handoff": {"rules": HandoffRules},
    "router": {
        "least_loaded": LeastLoaded,
        "round_robin": RoundRobin,
        "power_of_two": PowerOfTwo,
        "prefix_aware": PrefixAware,
        "cost_based": CostBased,
    },
    "placement": {"remote": RemotePlacement, "conditional": ConditionalPlacement},
    "admission": {"all": AdmitAll, "early_rejection": EarlyRejection},
    "eviction": {"prefix_lru": PrefixLru, "lru": Lru, "lfu": Lfu, "cost_aware": CostAware},
    "tiering": {"by_cost": LoadByCost, "always": AlwaysLoad},
    "roles": {"fixed": FixedRoles, "balance": BalanceRoles},
}
"""The names that a config may give; the line of a new policy goes here. A class that is named as
"module:Class" needs none."""

_CHOOSE = ("router", "placement")
"""Policies that others ask."""

_PROTOCOLS = get_type_hints(Policies)
"""What a policy of each role must be."""


def make_policies(config: Config, given: Mapping[str, Any] | None = None) -> Policies:
    """The policies of `config.policies`.

    Args:
      given: in place of some of them, by role, such as "prefill" or "router": a name as in a
        config, a class, or an object.

    Raises:
      ValueError: no such policy, or one that lacks a method.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(
            f"policies={shown(given)}: must map roles to policies, as in {{'prefill': ...}}; roles "
            f"are {', '.join(POLICIES)}"
        )
    given = dict(given or {})
    for role in given:
        if role not in POLICIES:
            raise ValueError(f"policies={shown(role)}: allowed are {', '.join(POLICIES)}")
    chosen = {role: given.get(role, getattr(config.policies, role)) for role in POLICIES}
    chooses = {role: _make(role, chosen[role], PolicySetup(config)) for role in _CHOOSE}
    setup = PolicySetup(config, **chooses)
    made = {role: _make(role, chosen[role], setup) for role in POLICIES if role not in _CHOOSE}
    return Policies(**chooses, **made)


def _make(role: str, chosen: Any, setup: PolicySetup) -> Any:
    name = f"policies.{role}={shown(chosen)}"
    policy = _find(role, chosen, name) if isinstance(chosen, str) else chosen
    if isinstance(policy, type):
        try:
            policy = policy(setup)
        except TypeError as error:
            what = f"called with a PolicySetup: {one_line(error)}"
            raise ValueError(f"{name}: {what}") from error
    protocol = _PROTOCOLS[role]
    methods = [
        name for name, member in vars(protocol).items() if name[0] != "_" and isfunction(member)
    ]
    missing = [method for method in methods if not callable(getattr(policy, method, None))]
    if missing:
        raise ValueError(f"{name}: a {role} policy must have the methods {', '.join(missing)}")
    lacking = [each for each in get_annotations(protocol) if not hasattr(policy, each)]
    if lacking:
        raise ValueError(f"{name}: a {role} policy must have the attributes {', '.join(lacking)}")
    return policy


def _find(role: str, text: str, name: str) -> Any:
    if text in POLICIES[role]:
        return POLICIES[role][text]
    module, colon, attribute = text.partition(":")
    if not colon:
        known = ", ".join(POLICIES[role])
        raise ValueError(f'{name}: allowed are {known}, or "module:Class"')
    try:
        return getattr(import_module(module), attribute)
    except Exception as error:  # whatever a module does when it is imported
        why = f"{type(error).__name__}: {one_line(error)}"
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            why += " on Python's path, which for commands includes the current folder"
        raise ValueError(f"{name}: {why}") from error
