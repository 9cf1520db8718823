"""How each row of a batch is sampled."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pdjax.core.request import MAX_LOGIT_BIAS
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.batches import NO_TOKEN, Masks, SamplingBatch

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
        self._biased: set[int] = set()
        self._bias_tokens, self._bias = _no_biases(0)

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
        if params.logit_bias:
            if not len(self._bias):  # as few requests have any
                self._bias_tokens, self._bias = _no_biases(len(self._arrays["seed"]))
            count = len(params.logit_bias)
            self._bias_tokens[row, :count] = list(params.logit_bias)
            self._bias[row, :count] = list(params.logit_bias.values())
            self._biased.add(row)

    def clear(self, row: int) -> None:
        """`row` is free."""
        self._taken = None
        for name, array in self._arrays.items():
            array[row] = 1 if name in ("top_p", "repetition_penalty") else 0
        if row in self._biased:
            self._biased.remove(row)
            self._bias_tokens[row], self._bias[row] = NO_TOKEN, 0

    def take(self) -> SamplingBatch:
        """A copy of the rows; the same object until a row changes, so that an engine may keep what
        it has made of it."""
        if self._taken is None:
            arrays = {name: array.copy() for name, array in self._arrays.items()}
            if self._biased:
                arrays |= {"bias_tokens": self._bias_tokens.copy(), "bias": self._bias.copy()}
            self._taken = SamplingBatch(**arrays)
        return self._taken


def _no_biases(rows: int) -> tuple[np.ndarray, np.ndarray]:
    shape = rows, MAX_LOGIT_BIAS
    return np.full(shape, NO_TOKEN, np.int32), np.zeros(shape, np.float32)


def masks_of(masks: Mapping[int, np.ndarray]) -> Masks | None:
    """The masks u32[ceil(V / 32)] of rows; None where no row has one."""
    if not masks:
        return None
    rows = sorted(masks)
    return Masks(np.array(rows, np.int32), np.stack([masks[row] for row in rows]))
