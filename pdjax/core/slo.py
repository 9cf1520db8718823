"""What makes a request good: bounds on its latencies."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from pdjax.core.messages import shown
from pdjax.core.numbers import is_number, plain


class Latencies(Protocol):
    """What is known of a completed request, in seconds; None where it had too few tokens."""

    @property
    def ttft(self) -> float | None: ...

    @property
    def tpot(self) -> float | None: ...

    @property
    def itl(self) -> Seq[float]: ...

    @property
    def e2e(self) -> float | None: ...


@dataclass(frozen=True, kw_only=True)
class SLO:
    """Service-level objective: the most seconds allowed of each latency; None allows any.

    A request is good if it meets all of them. One of a single token has neither TPOT nor ITL, and
    so meets any bound on them. Goodput is after DistServe (Zhong et al. 2024): the rate of requests
    that are good.

    Attributes:
      ttft: time to first token, from arrival.
      tpot: mean time per output token after the first.
      itl: inter-token latency; every gap between two tokens is held against it.
      e2el: end-to-end latency, from arrival to the last token.

    Raises:
      ValueError: a bound that is not a positive number.
    """

    ttft: float | None = None
    tpot: float | None = None
    itl: float | None = None
    e2el: float | None = None

    def __post_init__(self) -> None:
        for bound in fields(self):
            most: Any = plain(getattr(self, bound.name))
            if most is not None and not (is_number(most) and most > 0):
                raise ValueError(
                    f"slo.{bound.name}={shown(most)}: must be None or a positive number of seconds"
                )
            object.__setattr__(self, bound.name, most)

    def over(self, usual: "SLO | None") -> "SLO":
        """Its own bounds, and those of `usual` for latencies that it does not bound."""
        own = {f.name: most for f in fields(self) if (most := getattr(self, f.name)) is not None}
        return self if usual is None else replace(usual, **own)

    def met_by(self, latencies: Latencies) -> bool:
        """Whether a completed request was good."""
        reached = (
            (latencies.ttft, self.ttft),
            (latencies.tpot, self.tpot),
            (max(latencies.itl, default=None) if self.itl is not None else None, self.itl),
            (latencies.e2e, self.e2el),
        )
        return all(most is None or (value or 0.0) <= most for value, most in reached)
