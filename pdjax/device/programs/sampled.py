"""Tokens on their way from the devices to the host."""

from collections.abc import Callable

import jax
import numpy as np

from pdjax.device.compat import all_ready
from pdjax.device.models.sampling import Choice
from pdjax.device.worker import Done
from pdjax.interfaces.batches import NOT_FINITE, Sampled, SamplingBatch


class SampledTicket:
    """Tokens on their way to the host's memory, where the step writes them.

    Args:
      choice: what the step writes.
      sampling: the numpy batch that asked for it.
      max_logprobs: how many log-probabilities a row gets.
      inspect: called if the step has failed, since whatever it wrote has failed with it.
    """

    def __init__(
        self,
        choice: Choice,
        sampling: SamplingBatch,
        max_logprobs: int,
        inspect: Callable[[], None],
    ) -> None:
        self._leaves = jax.tree.leaves(choice) if sampling.logprobs.any() else [choice.tokens]
        self._max_logprobs, self._inspect = max_logprobs, inspect
        self._sampled: Sampled | None = None

    def ready(self) -> bool:
        return all_ready(self._leaves)

    def result(self) -> Sampled:
        if self._sampled is None:
            try:
                tokens, *logprobs = [np.asarray(leaf) for leaf in self._leaves]
            except Exception:
                self._inspect()
                raise
            self._sampled = Sampled(tokens, *(logprobs or _blank(len(tokens), self._max_logprobs)))
        return self._sampled


def nothing_sampled(sampling: SamplingBatch, max_logprobs: int) -> Done[Sampled]:
    """The ticket of a rehearsal that is left out."""
    rows = len(sampling.temperature)
    return Done(Sampled(np.full(rows, NOT_FINITE, np.int32), *_blank(rows, max_logprobs)))


def _blank(rows: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities that nobody has asked for."""
    shape = rows, most
    return np.zeros(rows, np.float32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
