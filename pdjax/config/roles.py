"""How engines change what they do, and when they go out of service."""

from dataclasses import dataclass

from pdjax.config.checks import MOST_ATTEMPTS, between, check_types, seconds
from pdjax.core.messages import shown


@dataclass(frozen=True)
class RolesConfig:
    """How engines change between prefill, decode and both, and when one is taken out of service;
    see `host/roles/`. Which engine changes is decided by `policies.roles`.

    Attributes:
      interval: seconds between two looks at the load of engines, and at how fast they are.
      ttft_target: seconds that a prompt may wait for its first token; "balance" holds the queue
        against it.
      high: the load of a side, 1 being all that its engines can do, from which "balance" gives it
        an engine of the other side.
      low: the load that the other side may have then, without that engine.
      holds: looks in a row that must find the same before an engine changes or is called slow.
      pause: seconds between two changes that "balance" makes.
      drain_deadline: seconds after which an engine that drains gives up what it still has, which is
        then prefilled again elsewhere; None lets all of it come to its end.
      slow_ratio: an engine whose steps take more than so many times those of its peers is drained,
        and out of service for a time; None looks at no engine so.
      failures: an engine of which so many steps have failed, less one for every 16 that have not,
        is out of service for a time; and a sequence is computed again so many times after failed
        steps, where another engine can. None does neither.
      retry_after: seconds after which an engine that was slow or failed is tried again; each
        further time it takes twice as long, up to 32 times.
    """

    interval: float = 1.0
    ttft_target: float = 1.0
    high: float = 0.9
    low: float = 0.7
    holds: int = 3
    pause: float = 10.0
    drain_deadline: float | None = 30.0
    slow_ratio: float | None = None
    failures: int | None = 3
    retry_after: float = 30.0

    def __post_init__(self) -> None:
        check_types("roles", self)
        seconds("roles", self, "interval", "ttft_target", "pause", "drain_deadline", "retry_after")
        between("roles", self, 1, MOST_ATTEMPTS, "holds", "failures")
        if self.slow_ratio is not None and not self.slow_ratio > 1:
            raise ValueError(f"roles.slow_ratio={shown(self.slow_ratio)}: must be None or above 1")
        if not 0 < self.low < self.high:
            raise ValueError(
                f"roles.low={shown(self.low)}, roles.high={shown(self.high)}: must be above 0, the "
                "lower one first"
            )
