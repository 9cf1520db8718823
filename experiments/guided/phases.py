"""Rows that decode together, some of them guided, and the gaps between their tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import numpy as np

from experiments.common.llm_engines import decode_held_back
from experiments.guided.forms import TimedGuide
from pdjax import LLM, SamplingParams
from pdjax.core.request import Request
from pdjax.host.sequences.constraint import Constraint, SequenceGuide
from pdjax.host.sequences.sequence import Sequence, State


@dataclass(frozen=True)
class Load:
    """The rows, their prompts, and a phase: `steps` gaps of each row without a guide, behind `warm`
    that are dropped."""

    rows: int
    prompt: int
    steps: int
    warm: int

    @property
    def output(self) -> int:
        """Most tokens of a row: the first, a phase, and those in flight at its end."""
        return 1 + self.warm + self.steps + 32


@dataclass(frozen=True)
class Phase:
    """What was seen.

    Attributes:
      gaps: [rows without a guide, steps], ms.
      guided: gaps of the guided rows in the same time, ms.
      masks: times to work a mask out, us.
    """

    gaps: np.ndarray
    guided: np.ndarray
    masks: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Percentiles; None where there is nothing."""
        return {
            "itl_ms": spread(self.gaps),
            "guided_itl_ms": spread(self.guided),
            "mask_us": spread(self.masks),
        }


def spread(values: np.ndarray) -> dict[str, float] | None:
    """Percentiles and mean; None of nothing."""
    if not values.size:
        return None
    found = {f"p{q}": float(np.percentile(values, q)) for q in (50, 99)}
    return found | {"mean": float(values.mean())}


class Rows:
    """Runs phases on one LLM. Each has new rows, which are prefilled while decode is held back, so
    that all of them decode from its beginning to its end.

    The model has no tokenizer, so that its requests can't name a guide; each guide is put into its
    sequence between `coordinator.sequences_of` and `coordinator.enqueue`.

    Args:
      make: makes a guide of a form.
    """

    def __init__(self, llm: LLM, load: Load, make: Callable[[str], SequenceGuide]) -> None:
        self._llm, self._load, self._make = llm, load, make
        self._numbers = count()

    def phase(self, form: str, guided: int) -> Phase:
        """Decode with the last `guided` rows guided.

        Raises:
          RuntimeError: a row has ended too soon.
        """
        load, masks = self._load, list[float]()
        rows = [self._submit(form, None) for _ in range(load.rows - guided)]
        rows += [self._submit(form, masks) for _ in range(guided)]
        with decode_held_back(self._llm):
            while not all(row.state is State.DECODING for row in rows):
                self._step(rows)
        free, bound = rows[: load.rows - guided], rows[load.rows - guided :]
        begun = len(free[0].output)
        self._until(rows, free, begun + load.warm)
        masks.clear()
        self._until(rows, free, begun + load.warm + load.steps)
        last = begun + load.warm + load.steps
        moments = [self._moments(row)[last - load.steps - 1 : last] for row in free]
        since, until = moments[0][0], moments[0][-1]
        theirs = [[at for at in self._moments(row) if since <= at <= until] for row in bound]
        self._end(rows)
        return Phase(
            np.diff(np.array(moments)) * 1e3,
            np.array([b - a for each in theirs for a, b in pairwise(each)]) * 1e3,
            np.array(masks) * 1e6,
        )

    def _submit(self, form: str, masks: list[float] | None) -> Sequence:
        """Queue a row; one with a list for the times of its masks is guided."""
        llm, coordinator, number = self._llm, self._llm.coordinator, next(self._numbers)
        prompt = np.random.default_rng(number).integers(1, llm.spec.vocab_size, self._load.prompt)
        params = SamplingParams(max_tokens=self._load.output, ignore_eos=True)
        request = Request(f"row-{number}", tuple(prompt.tolist()), params, llm.clock.now())
        [row] = coordinator.sequences_of(request)
        if masks is not None:
            guide = TimedGuide(self._make(form), masks)
            row.constraint = Constraint(params, guide, llm.spec.vocab_size, llm.spec.eos_token_ids)
        coordinator.enqueue([row])
        return row

    def _moments(self, row: Sequence) -> list[float]:
        return list(self._llm.recorder.request(row).token_times)

    def _until(self, rows: list[Sequence], free: list[Sequence], tokens: int) -> None:
        """Step until each row without a guide has so many tokens."""
        while min(len(row.output) for row in free) < tokens:
            self._step(rows)

    def _step(self, rows: list[Sequence]) -> None:
        self._llm.coordinator.step()
        for row in rows:
            if row.done:
                raise RuntimeError(f"a row has ended ({row.finish_reason}): {row.error}")

    def _end(self, rows: list[Sequence]) -> None:
        for row in rows:
            self._llm.coordinator.abort(row.request.id)
        while self._llm.coordinator.has_work:
            self._llm.coordinator.step()
