"""The two phases of `interference`: rows that decode, intruders beside them, and what they saw."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from experiments.common.llm_engines import decode_held_back
from experiments.common.step_times import IDLE, POLLS, StepTimes
from experiments.interference.load import Load
from experiments.interference.picture import SHARES
from pdjax import LLM, SamplingParams
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.request import RequestMetrics
from pdjax.host.sequences import sequence as states

_DRAWN = 64
"""Prompts of intruders drawn before a phase: drawing one takes a part of a millisecond, in which
the loop sees no token."""


class Intruders:
    """Long prompts, a fixed number at once: when one has its answer, the next is submitted.

    Attributes:
      finished: metrics of the answered intruders.
    """

    def __init__(self, llm: LLM, load: Load) -> None:
        self.finished: list[RequestMetrics] = []
        self._llm, self._load = llm, load
        self._rng = np.random.default_rng(1)
        self._drawn = [self._draw() for _ in range(_DRAWN)]
        self._ids: list[str] = []

    def keep_coming(self) -> None:
        """Take finished answers, and submit as many new intruders."""
        for request_id in list(self._ids):
            answer = self._llm.take_output(request_id)
            if answer is None:
                continue
            if answer.choices[0].error is not None:
                raise RuntimeError(f"an intruder failed: {answer.choices[0].error}")
            self._ids.remove(request_id)
            self.finished.append(answer.metrics)
        while len(self._ids) < self._load.intruders:
            prompt = self._drawn.pop() if self._drawn else self._draw()
            self._ids.append(self._llm.submit(prompt, _greedy(self._load.long_output)))

    def _draw(self) -> list[int]:
        return self._rng.integers(1, self._llm.spec.vocab_size, self._load.long).tolist()


class Watch:
    """Rows that decode all the time, and the gaps between their tokens in each phase.

    Each phase has new rows: those of the phase before have grown, and longer rows take more time.
    All rows are prefilled and handed over while decode is held back, so that they start together.
    """

    def __init__(self, llm: LLM, load: Load) -> None:
        self._llm, self._load = llm, load
        self._times = StepTimes(llm)
        self._rng = np.random.default_rng(0)
        self._rows: list[states.Sequence] = []

    def phase(self, intruders: Intruders | None = None) -> dict[str, Any]:
        """Measure from the end of the dropped ticks until every row has had all its gaps. Intruders
        come from before the first dropped tick until the end."""
        llm, load = self._llm, self._load
        ids = self._begin()
        begun = [len(row.output) for row in self._rows]
        self._decode(begun, load.warm, intruders)
        llm.recorder.clear()
        self._times.seconds.clear()
        if intruders is not None:
            intruders.finished.clear()
        start = llm.clock.now()
        self._decode(begun, load.warm + load.steps, intruders)
        seconds = llm.clock.now() - start
        gaps: list[float] = []
        preemptions = 0
        for row, first in zip(self._rows, begun, strict=True):
            metrics = llm.recorder.request(row)
            preemptions += metrics.preemptions
            last = first + load.warm + load.steps
            moments = metrics.token_times[first + load.warm - 1 : last]
            gaps += [after - before for before, after in pairwise(moments)]
        seen = spread(gaps) | {
            "seconds": seconds,
            "context": [load.prompt + n + load.warm for n in (min(begun), max(begun) + load.steps)],
            "preemptions": preemptions,
            "host_busy": 1 - (self._times.seconds[IDLE] + self._times.seconds[POLLS]) / seconds,
        }
        if intruders is not None:
            seen |= prefilled(llm.recorder, intruders.finished, seconds)
        self._end(ids)
        return seen

    def _begin(self) -> list[str]:
        """Submit the rows, and step until all of them are about to decode; return their ids."""
        llm, load = self._llm, self._load
        shape = (load.rows, load.prompt)
        prompts = self._rng.integers(1, llm.spec.vocab_size, shape).tolist()
        ids = [llm.submit(prompt, _greedy(load.output)) for prompt in prompts]
        self._rows = [llm.sequences(request_id)[0] for request_id in ids]
        with decode_held_back(llm):
            while not all(row.state is states.State.DECODING for row in self._rows):
                self._step()
        return ids

    def _end(self, ids: Sequence[str]) -> None:
        """Abort the rows, so that they free their pages."""
        rows, self._rows = self._rows, []
        for request_id in ids:
            self._llm.abort(request_id)
        while not all(row.done for row in rows):
            self._step()

    def _decode(self, begun: list[int], tokens: int, intruders: Intruders | None) -> None:
        """Step until each row has generated `tokens` tokens beyond its count in `begun`."""
        while min(len(row.output) - n for row, n in zip(self._rows, begun, strict=True)) < tokens:
            if intruders is not None:
                intruders.keep_coming()
            self._step()

    def _step(self) -> None:
        self._times.step()
        for row in self._rows:
            if row.done:
                raise RuntimeError(f"a row has ended ({row.finish_reason}): {row.error}")


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def spread(gaps: Sequence[float]) -> dict[str, Any]:
    """Summarize gaps, in seconds, as milliseconds; `curve_ms` are their quantiles at SHARES."""
    ms = np.array(gaps) * 1e3
    p50, p90, p99 = np.percentile(ms, (50, 90, 99)).tolist()
    itl = {"p50": p50, "p90": p90, "p99": p99, "max": float(ms.max()), "mean": float(ms.mean())}
    return {
        "gaps": len(gaps),
        "itl_ms": itl,
        "curve_ms": np.quantile(ms, SHARES).round(4).tolist(),
    }


def prefilled(
    recorder: Recorder, finished: Sequence[RequestMetrics], seconds: float
) -> dict[str, Any]:
    """Summarize the intruders of a phase of `seconds`, and the times of their hand-offs."""
    ttft = [m.ttft * 1e3 for m in finished if m.ttft is not None]
    alone = [(m.ttft - m.queue) * 1e3 for m in finished if m.ttft is not None and m.queue]
    steps = [work for track, work in recorder.engines.items() if track.startswith("prefill/")]
    tokens = sum(work.sums["tokens"] for work in steps)
    totals = recorder.transfers
    each = max(1, totals.transfers)
    return {
        "intruders": {
            "finished": len(finished),
            "ttft_ms": {f"p{n}": _percentile(ttft, n) for n in (50, 99)},
            "prefill_ms": _percentile(alone, 50),
            "prefill_tokens_per_s": tokens / seconds,
        },
        "transfers": totals.to_json()
        | {
            "bytes_each": totals.bytes / each,
            "exposed_ms_each": totals.exposed_s / each * 1e3,
            "hidden": totals.hidden_s / totals.wire_s if totals.wire_s else None,
        },
    }


def _percentile(values: Sequence[float], n: int) -> float | None:
    return float(np.percentile(values, n)) if values else None
