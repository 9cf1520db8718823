"""What a tiering policy sees and answers; `policies/api.py` says what all policies have in
common."""

from dataclasses import dataclass
from typing import Protocol

from pdjax.core.ids import EngineId, PoolId
from pdjax.host.sequences.sequence import Sequence


@dataclass(frozen=True)
class LoadChoice:
    """A sequence of the queue whose prefix, as far as it is in the pool of an engine, goes on in a
    tier.

    Attributes:
      sequence: waits.
      engine: would prefill it.
      tier: the pool that the KV would come from.
      tokens: whose KV would be brought up.
      nbytes: of their KV.
      load_seconds: predicted until all of it has been written, with what is on the way before it;
        None where nothing has been measured.
      compute_seconds: predicted to compute the tokens in steps of the engine; None likewise.
    """

    sequence: Sequence
    engine: EngineId
    tier: PoolId
    tokens: int
    nbytes: int
    load_seconds: float | None
    compute_seconds: float | None


class TieringPolicy(Protocol):
    """Decides whether KV comes up from a tier."""

    def loads(self, choice: LoadChoice, now: float) -> bool:
        """Whether KV is brought up before the sequence is prefilled; else it is computed. It is
        asked once of each sequence, and again after it has been preempted."""
        ...
