"""Who decides."""

import math
from dataclasses import dataclass

from pdjax.config.checks import MOST_TOKENS, between, check_types, one_of, seconds
from pdjax.core.messages import shown
from pdjax.core.numbers import is_number

VICTIMS = ("youngest", "lowest_priority", "most_pages", "latest_deadline")

_LEAST = dict.fromkeys(
    ("seconds_a_class", "tokens_a_second", "output_weight", "imbalance_steps", "imbalance_rows"), 0
)
"""The least values of what policies weigh one thing against another by."""


@dataclass(frozen=True)
class PoliciesConfig:
    """Who decides; see `host/policies/api.py`.

    Attributes:
      prefill: which sequences are prefilled next, in which steps: "fcfs", "shortest_first",
        "earliest_deadline", "priority" or "fair".
      decode: which sequences decode, and which give way: "fcfs", "shortest_first",
        "earliest_deadline", "priority" or "prefill_order".
      handoff: whether KV moves, when and where to: "rules", those of HandoffConfig.
      router: which of several engines: "least_loaded", "round_robin", "power_of_two",
        "prefix_aware" or "cost_based".
      placement: where a prompt is prefilled: "remote", on engines that are for prefill;
        "conditional", on an engine that is for decode, beside its rows, where little of the prompt
        is to compute or the prefill side is late. The latter needs `flexible` engines.
      local_tokens: most tokens to compute of a prompt that "conditional" prefills on an engine that
        is for decode without asking which side is sooner.
      admission: which requests are refused early: "all" admits all of them; "early_rejection" sheds
        those that miss their deadline or SLO by what is predicted.
      eviction: which pages of a prefix cache go first when none is free: "prefix_lru", "lru", "lfu"
        or "cost_aware".
      tiering: whether a prefix that lies in a tier is brought up or computed again: "by_cost" takes
        what is predicted to be sooner, "always" brings it up. See TiersConfig.
      roles: which engines change what they do, and when: "fixed" changes none; "balance" moves
        engines to the side with more to do than it can. See RolesConfig.
      victim: which sequence gives up its pages first when a decode pool is full: "youngest",
        "lowest_priority", "most_pages" or "latest_deadline".
      tpot_target: seconds between two tokens of a row that decode engines are held to: no row more
        is taken while they are predicted to be longer, and "conditional" lets in no more prompt
        tokens beside rows. None takes rows while there are any.
      seconds_a_class: seconds of waiting that make up for a class of "priority"; infinite is
        strict.
      tokens_a_second: tokens of a prompt that a second of waiting makes up for with
        "shortest_first"; 0 lets short prompts starve long ones.
      tenant_weights: (tenant, weight) pairs for "fair": the shares of tenants that all have prompts
        waiting. A tenant that is not named has weight 1.
      output_weight: what "fair" charges for a token of an answer, where one of a prompt costs 1.
      imbalance_steps: whole prefill steps by which "prefix_aware" lets the engine with the longest
        prefix have more to do than the one with the least; beyond that the prefix is computed
        again.
      imbalance_rows: the share of decode rows by which it may have more taken, likewise.

    Each is one of these names, or "module:Class" of a class of one's own, which is called with a
    `PolicySetup`.
    """

    prefill: str = "fcfs"
    decode: str = "fcfs"
    handoff: str = "rules"
    router: str = "least_loaded"
    placement: str = "remote"
    local_tokens: int = 128
    admission: str = "all"
    eviction: str = "prefix_lru"
    tiering: str = "by_cost"
    roles: str = "fixed"
    victim: str = "youngest"
    tpot_target: float | None = None
    seconds_a_class: float = 30.0
    tokens_a_second: float = 500.0
    tenant_weights: tuple[tuple[str, float], ...] = ()
    output_weight: float = 2.0
    imbalance_steps: float = 4.0
    imbalance_rows: float = 0.25

    def __post_init__(self) -> None:
        check_types("policies", self)
        one_of("policies.victim", self.victim, VICTIMS)
        between("policies", self, 0, MOST_TOKENS, "local_tokens")
        seconds("policies", self, "tpot_target")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            infinite = name == "seconds_a_class" and value == math.inf
            if not (infinite or (is_number(value) and value >= least)):
                raise ValueError(
                    f"policies.{name}={shown(value)}: must be a number, {least} or more"
                    + (", or infinite" if name == "seconds_a_class" else "")
                )
        for pair in self.tenant_weights:
            named = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
            if not (named and is_number(pair[1]) and pair[1] > 0):
                raise ValueError(
                    f"policies.tenant_weights={shown(pair)}: must be pairs of a tenant and a "
                    "positive number"
                )
