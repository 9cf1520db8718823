"""Tokens on their way from the devices to the host."""

from collections.abc import Callable
from collections.abc import Sequence as Seq

import jax
import numpy as np

from pdjax.device.compat import all_ready
from pdjax.device.models.sampling import Choice
from pdjax.device.steps.score import Scored
from pdjax.device.worker import Done
from pdjax.interfaces.batches import NOT_FINITE, Sampled, SamplingBatch, Scores, joined


class SampledTicket:
    """Tokens on their way to the host's memory, where the step writes them.

    Args:
      choice: what the step writes.
      sampling: the numpy batch that asked for it.
      max_logprobs: how many log-probabilities a row gets.
      inspect: called if the step has failed, since whatever it wrote has failed with it.
      scored: log-probabilities of prompts, in pieces; none where nobody asks.
      on_devices: i32[B], the tokens once more, for other engines; 0 where none was chosen. None
        where no other engine reads them.
    """

    def __init__(
        self,
        choice: Choice,
        sampling: SamplingBatch,
        max_logprobs: int,
        inspect: Callable[[], None],
        scored: Seq[Scored] = (),
        on_devices: jax.Array | None = None,
    ) -> None:
        self.on_devices = on_devices
        self._leaves = jax.tree.leaves(choice) if sampling.logprobs.any() else [choice.tokens]
        self._max_logprobs, self._inspect, self._scored = max_logprobs, inspect, scored
        self._sampled: Sampled | None = None

    def ready(self) -> bool:
        return all_ready([self._leaves, self._scored])

    def result(self) -> Sampled:
        if self._sampled is None:
            try:
                tokens, *found = [np.asarray(leaf) for leaf in self._leaves]
                scores = self._scores()
            except Exception:
                self._inspect()
                raise
            chosen, ids, top = found or _blank(len(tokens), self._max_logprobs)
            self._sampled = Sampled(tokens, chosen, ids, top, scores)
        return self._sampled

    def _scores(self) -> Scores | None:
        if not self._scored:
            return None
        pieces = zip(*map(jax.tree.leaves, self._scored), strict=True)
        chosen, top_ids, top, ranks = (np.concatenate(list(map(np.asarray, x))) for x in pieces)
        return Scores(chosen, ranks, top_ids, top)


class BothTickets:
    """The tokens of a mixed step: first those of its chunks, then those of its rows.

    Args:
      chunks, rows: on their way.
    """

    def __init__(self, chunks: SampledTicket, rows: SampledTicket) -> None:
        self._chunks, self._rows = chunks, rows

    def ready(self) -> bool:
        return self._rows.ready() and self._chunks.ready()

    def result(self) -> Sampled:
        rows = (
            self._rows.result()
        )  # first: it looks at the rows' state, too, if the step has failed
        return joined(self._chunks.result(), rows)


class _NothingSampled(Done[Sampled]):
    def __init__(self, outcome: Sampled) -> None:
        super().__init__(outcome)
        self.on_devices = np.zeros(len(outcome.tokens), np.int32)


def nothing_sampled(rows: int, max_logprobs: int) -> Done[Sampled]:
    """The ticket of a rehearsal that is left out, of so many rows."""
    none = np.full(rows, NOT_FINITE, np.int32)
    return _NothingSampled(Sampled(none, *_blank(rows, max_logprobs)))


def _blank(rows: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities that nobody has asked for."""
    shape = rows, most
    return np.zeros(rows, np.float32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
