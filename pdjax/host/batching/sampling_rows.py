"""How each row of a batch is sampled."""

from typing import Any

import numpy as np

from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.batches import SamplingBatch

_HOTTEST = float(np.finfo(np.float32).max)


_MOST_K = int(np.iinfo(np.int32).max)


_LEAST_P = float(np.finfo(np.float32).tiny)


class SamplingRows:
    """How each row of a batch is sampled, kept as the arrays of a SamplingBatch.

    Args:
      rows: how many.
    """

    def __init__(self, rows: int) -> None:
        self._taken: SamplingBatch | None = None  # as the rows are now, if it has been asked for
        self._arrays = {
            "temperature": np.zeros(rows, np.float32),
            "top_k": np.zeros(rows, np.int32),
            "top_p": np.ones(rows, np.float32),
            "min_p": np.zeros(rows, np.float32),
            "presence_penalty": np.zeros(rows, np.float32),
            "frequency_penalty": np.zeros(rows, np.float32),
            "repetition_penalty": np.ones(rows, np.float32),
            "seed": np.zeros(rows, np.uint32),
            "prompt_lens": np.zeros(rows, np.int32),
            "logprobs": np.zeros(rows, np.bool_),
        }

    def fill(self, row: int, sequence: Sequence) -> None:
        """Sample `row` as `sequence` asks."""
        self._taken = None
        params = sequence.request.params
        values: dict[str, Any] = {
            "seed": sequence.seed,
            "prompt_lens": sequence.prompt_len,
            "logprobs": params.logprobs is not None,
            # Legal values beyond the range of the arrays' types mean the same as their bounds.
            "temperature": min(params.temperature, _HOTTEST),
            "top_k": min(params.top_k, _MOST_K),
            "top_p": max(params.top_p, _LEAST_P),
        }
        for name, array in self._arrays.items():
            array[row] = values[name] if name in values else getattr(params, name)

    def clear(self, row: int) -> None:
        """`row` is free."""
        self._taken = None
        for name, array in self._arrays.items():
            array[row] = 1 if name in ("top_p", "repetition_penalty") else 0

    def take(self) -> SamplingBatch:
        """A copy of the rows; the same object until a row changes, so that an engine may keep what
        it has made of it."""
        if self._taken is None:
            arrays = {name: array.copy() for name, array in self._arrays.items()}
            self._taken = SamplingBatch(**arrays)
        return self._taken
