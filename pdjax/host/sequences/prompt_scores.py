"""The log-probabilities of a prompt, as the prefill steps of its chunks bring them."""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq

import numpy as np

from pdjax.core.logprobs import PromptLogprobs
from pdjax.core.request import Request
from pdjax.interfaces.batches import Scores


class PromptScores:
    """What is known of the log-probabilities of one prompt. It outlives a preemption: what is known
    is not asked for again.

    Args:
      prompt_len: tokens of the prompt.
      most: how many of the likeliest tokens are kept.
    """

    def __init__(self, prompt_len: int, most: int) -> None:
        self._prompt_len, self._most = prompt_len, most
        self._parts: list[Scores] = []
        self._report: PromptLogprobs | None = None

    @classmethod
    def asked_by(cls, request: Request, choice: int) -> "PromptScores | None":
        """Those that a choice of a request brings; the first one does so for all."""
        most = request.params.prompt_logprobs
        if most is None or choice > 0:
            return None
        return cls(len(request.prompt_token_ids), most)

    @property
    def known(self) -> int:
        """First tokens of the prompt of which all is known; the very first one has nothing."""
        return 1 + sum(len(part.chosen) for part in self._parts)

    @property
    def complete(self) -> bool:
        """Whether the whole prompt is known."""
        return self.known == self._prompt_len

    def told_by(self, start: int, stop: int) -> range:
        """The tokens, by their places in the prompt, that a chunk `[start, stop)` tells of and that
        are not known: the logits at a place are about the next one."""
        return range(max(start + 1, self.known), min(stop + 1, self._prompt_len))

    def add(self, scores: Scores) -> None:
        """Take what a step tells of the next tokens."""
        best = slice(self._most)
        # Copies: the step's own arrays are as wide as its engine's bound, and hold other prompts.
        self._parts.append(
            Scores(
                scores.chosen.copy(),
                scores.ranks.copy(),
                scores.top_ids[:, best].copy(),
                scores.top_logprobs[:, best].copy(),
            )
        )

    def report(self, token_ids: Seq[int]) -> PromptLogprobs | None:
        """All of it; None where a part is missing.

        Args:
          token_ids: of the prompt.
        """
        if self._report is None and self.complete:
            parts = self._parts or [_NOTHING]
            self._report = PromptLogprobs(
                np.array(token_ids, np.int32),
                np.concatenate([part.chosen for part in parts]),
                np.concatenate([part.ranks for part in parts]),
                np.concatenate([part.top_ids for part in parts]),
                np.concatenate([part.top_logprobs for part in parts]),
            )
        return self._report


def of_each(scores: Scores | None, told: Iterable[range]) -> Iterator[Scores | None]:
    """Cut what a step has brought into what it tells of each of its chunks; None of a chunk that
    tells nothing.

    Args:
      told: `told_by` each chunk, when the step was dispatched.
    """
    first = 0
    for places in told:
        rows = slice(first, first + len(places))
        first = rows.stop
        if scores is None or not places:
            yield None
        else:
            yield Scores(
                scores.chosen[rows],
                scores.ranks[rows],
                scores.top_ids[rows],
                scores.top_logprobs[rows],
            )


_NOTHING = Scores(
    np.zeros(0, np.float32),
    np.zeros(0, np.int32),
    np.zeros((0, 0), np.int32),
    np.zeros((0, 0), np.float32),
)
"""What is told of a prompt of one token."""
