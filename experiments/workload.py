"""What a benchmark asks of every system alike, and what each of them reached."""

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
      steps: decode steps a round, the prompt's own next token not counted.
      prefill: tokens of the one prompt whose prefill is timed.
      rounds: rounds a number, of which the median is taken; one more goes before to warm up.
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
        """Tokens of the longest sequence."""
        return max(self.prefill, self.context + self.steps + 1)

    def prompts(self, token_ids: list[int], rows: int) -> list[list[int]]:
        """A prompt a row, cut from one text, each beginning elsewhere."""
        return [token_ids[5 * row :][: self.context] for row in range(rows)]

    def median_seconds(self, work: Callable[[], object]) -> float:
        """Median wall time of `work`, after a round to warm up."""
        times = []
        for _ in range(self.rounds + 1):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])


@dataclass
class Numbers:
    """What a system reached; decode by batch, in milliseconds a step.

    Attributes:
      prefill_tokens_per_s: one prompt of `Workload.prefill` tokens.
      bare_ms: the model's step alone, with its tokens fed back.
      served_ms: the median gap between tokens as a user of the system sees them.
      token_ids: the greedy continuation of each row.
    """

    prefill_tokens_per_s: float = 0.0
    bare_ms: dict[int, float] = field(default_factory=dict)
    served_ms: dict[int, float] = field(default_factory=dict)
    token_ids: dict[int, list[list[int]]] = field(default_factory=dict)
