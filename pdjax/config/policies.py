"""Who decides."""

from dataclasses import dataclass

from pdjax.config.checks import check_types


@dataclass(frozen=True)
class PoliciesConfig:
    """Who decides; see `host/policies/api.py`.

    Attributes:
      prefill: which sequences are prefilled next, in which steps: "fcfs".
      decode: which sequences decode, and which give way: "fcfs".
      handoff: whether KV moves, when and where to: "rules", those of HandoffConfig.
      router: which of several engines: "least_loaded", "round_robin", "power_of_two",
        "prefix_aware" or "cost_based".

    Each is one of these names, or "module:Class" of a class of one's own, which is called with a
    `PolicySetup`.
    """

    prefill: str = "fcfs"
    decode: str = "fcfs"
    handoff: str = "rules"
    router: str = "least_loaded"

    def __post_init__(self) -> None:
        check_types("policies", self)
