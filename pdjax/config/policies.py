"""Who decides."""

from dataclasses import dataclass

from pdjax.config.checks import MOST_TOKENS, between, check_types, one_of, seconds
from pdjax.core.messages import shown
from pdjax.core.numbers import is_number

VICTIMS = ("youngest", "lowest_priority", "most_pages", "latest_deadline")


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
      roles: which engines change what they do, and when: "fixed" changes none; "balance" moves
        engines to the side with more to do than it can. See RolesConfig.
      victim: which sequence gives up its pages first when a decode pool is full: "youngest",
        "lowest_priority", "most_pages" or "latest_deadline".
      tpot_target: seconds between two tokens of a row that decode engines are held to: no row more
        is taken while they are predicted to be longer, and "conditional" lets in no more prompt
        tokens beside rows. None takes rows while there are any.
      tenant_weights: (tenant, weight) pairs for "fair": the shares of tenants that all have prompts
        waiting. A tenant that is not named has weight 1.

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
    roles: str = "fixed"
    victim: str = "youngest"
    tpot_target: float | None = None
    tenant_weights: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        check_types("policies", self)
        one_of("policies.victim", self.victim, VICTIMS)
        between("policies", self, 0, MOST_TOKENS, "local_tokens")
        seconds("policies", self, "tpot_target")
        for pair in self.tenant_weights:
            named = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
            if not (named and is_number(pair[1]) and pair[1] > 0):
                raise ValueError(
                    f"policies.tenant_weights={shown(pair)}: must be pairs of a tenant and a "
                    "positive number"
                )
