"""The workload that a benchmark gives to every system, and the numbers of each system."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

TEXT = (
    "The tide had gone out before dawn, and the keeper of the lighthouse walked along the wet sand "
    "counting the boats that had not come home. There were four of them, as there had been "
    "yesterday. He wrote the number in his book, lit the stove, and began to clean the lamp. "
)


@dataclass(frozen=True)
class Workload:
    """A benchmark of one model on one device; all tokens are greedy.

    Attributes:
      batches: numbers of rows that decode at once.
      context: tokens of each prompt that is then decoded.
      steps: decode steps a round, without the token that prefill makes.
      prefill: tokens of the one prompt that prefill is timed with.
      rounds: rounds a number; the median counts, and one more round before warms up.
    """

    batches: tuple[int, ...]
    context: int
    steps: int
    prefill: int
    rounds: int

    def __post_init__(self) -> None:
        for name in ("context", "steps", "prefill", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batch={list(self.batches)}: each must be at least 1")

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence."""
        return max(self.prefill, self.context + self.steps + 1)

    def prompts(self, token_ids: list[int], rows: int) -> list[list[int]]:
        """Cut a prompt a row from one text, each from another place."""
        return [token_ids[5 * row :][: self.context] for row in range(rows)]

    def median_seconds(self, work: Callable[[], object]) -> float:
        """Return the median wall time of `work`, after a round to warm up."""
        times = []
        for _ in range(self.rounds + 1):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])


@dataclass
class Numbers:
    """The numbers of a system; decode by batch, in milliseconds a step.

    Attributes:
      prefill_tokens_per_s: rate of one prompt of `Workload.prefill` tokens.
      bare_ms: the model's step alone, with its tokens fed back.
      served_ms: median gap between tokens for a user of the system.
      token_ids: the greedy continuation of each row.
    """

    prefill_tokens_per_s: float = 0.0
    bare_ms: dict[int, float] = field(default_factory=dict)
    served_ms: dict[int, float] = field(default_factory=dict)
    token_ids: dict[int, list[list[int]]] = field(default_factory=dict)
