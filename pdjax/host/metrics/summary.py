"""A run in numbers: statistics over its requests, goodput, and the report that is saved as JSON.

The names of metrics differ between the tools of this field, so `definitions.py` says what they mean
here, and is written beside the numbers. The keys of `summarize` are those of vLLM's serving
benchmark where it has such a metric, so that whatever plots its results plots these.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from pdjax.core.slo import SLO
from pdjax.host.metrics.definitions import SAMPLED, definitions, statistic_keys
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.request import RequestMetrics

ALARMS = ("layout_changing_puts", "reprefilled_tokens")
"""Totals of transfers that must be 0: bytes that went by way of the host's memory, and tokens
computed again since a hand-off had failed for good."""


def summarize(
    requests: Iterable[RequestMetrics],
    slo: SLO | Seq[SLO | None] | None = None,
    percentiles: tuple[int, ...] = (90, 99),
) -> dict[str, Any]:
    """Metrics of a run by the JSON keys of vLLM's serving benchmark; see `definitions.py`.

    Args:
      requests: finished ones.
      slo: what makes a request good; of each request, in their order, where they have SLOs of their
        own. One without is in no number of good ones, nor in what those are a share of.
      percentiles: which `p{N}_{metric}_ms` to give besides mean, median and standard deviation.

    Returns:
      numbers by key; None where there is nothing to take a statistic of.
    """
    everyone = list(requests)
    done = [metrics for metrics in everyone if metrics.completed]
    failed = sum(metrics.failed for metrics in everyone)
    shed = sum(metrics.shed for metrics in everyone)
    good, of = _good(everyone, slo)
    inputs, outputs = sum(m.prompt_tokens for m in done), sum(m.output_tokens for m in done)
    first = min((m.arrival for m in done), default=0.0)
    duration = max((m.token_times[-1] for m in done if m.token_times), default=first) - first
    summary: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": failed,
        "shed": shed,
        "aborted": len(everyone) - len(done) - failed - shed,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": _ratio(len(done), duration),
        "request_goodput": _ratio(good, duration),
        "slo_good": good,
        "slo_total": None if good is None else of,
        "slo_attainment": _ratio(good, of),
        "output_throughput": _ratio(outputs, duration),
        "total_token_throughput": _ratio(inputs + outputs, duration),
        "max_output_tokens_per_s": _most_a_second(done, first),
        "max_concurrent_requests": _most_at_once(done),
    }
    for name, values in _samples(done).items():
        summary |= _statistics(name, values * 1e3, percentiles)
    return summary


def _good(
    everyone: Seq[RequestMetrics], slo: SLO | Seq[SLO | None] | None
) -> tuple[int | None, int]:
    """How many requests met their SLOs, None where none has any; and of how many that have."""
    slos = [slo] * len(everyone) if slo is None or isinstance(slo, SLO) else slo
    held = [
        bool(metrics.completed and bounds.met_by(metrics))
        for metrics, bounds in zip(everyone, slos, strict=True)
        if bounds is not None and (metrics.completed or metrics.failed or metrics.shed)
    ]
    known = isinstance(slo, SLO) or any(bounds is not None for bounds in slos)
    return sum(held) if known else None, len(held)


def _samples(done: list[RequestMetrics]) -> dict[str, np.ndarray]:
    """The values of each metric in `SAMPLED`, seconds."""
    gaps = [np.diff(np.asarray(m.token_times, np.float64)) for m in done]
    first = [gap for m in done if (gap := m.first_gap) is not None]
    values = {
        "queue": _known(m.queue for m in done),
        "ttft": _known(m.ttft for m in done),
        "row_wait": _known(gap.row_wait for gap in first),
        "kv_wait": _known(gap.kv_wait for gap in first),
        "tick_wait": _known(gap.tick_wait for gap in first),
        "tpot": _known(m.tpot for m in done),
        "itl": np.concatenate([np.zeros(0), *gaps]),
        "icl": np.concatenate([np.zeros(0), *(each[each > 0] for each in gaps)]),
        "e2el": _known(m.e2e for m in done),
    }
    return {name: values[name] for name in SAMPLED}


def report(recorder: Recorder, slo: SLO | None = None) -> dict[str, Any]:
    """A whole run as plain values: `summarize`, and requests, engines, transfers, definitions."""
    requests = recorder.requests()
    return {
        **summarize(requests, slo),
        "requests": [metrics.to_json() for metrics in requests],
        **work_of(recorder),
        "definitions": definitions(),
    }


def work_of(recorder: Recorder) -> dict[str, Any]:
    """The part of a report that is about engines, transfers and links."""
    return {
        "engines": {track: work.to_json() for track, work in sorted(recorder.engines.items())},
        "transfers": recorder.transfers.to_json(),
        "alarms": [name for name in ALARMS if getattr(recorder.transfers, name)],
        "links": {name: link.to_json() for name, link in sorted(recorder.links.items())},
        "prefills": {"local": recorder.local_prefills, "remote": recorder.remote_prefills},
        "duties": {name: duty.to_json() for name, duty in sorted(recorder.duties.items())},
    }


def _known(values: Iterable[float | None]) -> np.ndarray:
    return np.array([value for value in values if value is not None], np.float64)


def _ratio(count: float | None, total: float) -> float | None:
    return None if count is None or total <= 0 else count / total


def _statistics(
    name: str, sample: np.ndarray, percentiles: tuple[int, ...]
) -> dict[str, float | None]:
    statistics = "mean", "median", "std", *(f"p{n}" for n in percentiles)
    keys = statistic_keys(name, statistics)
    if not sample.size:
        return dict.fromkeys(keys)
    numbers = [sample.mean(), np.median(sample), sample.std(), *np.percentile(sample, percentiles)]
    return {key: float(number) for key, number in zip(keys, numbers, strict=True)}


def _most_a_second(requests: list[RequestMetrics], first: float) -> int:
    """The most tokens in one of the seconds that follow each other from `first` on, as vLLM's
    benchmark counts them."""
    moments = np.concatenate([np.zeros(0), *(np.asarray(m.token_times) for m in requests)])
    return int(np.bincount((moments - first).astype(np.int64)).max()) if moments.size else 0


def _most_at_once(requests: list[RequestMetrics]) -> int:
    """The most requests that were, at one moment, between their arrival and their last token."""
    changes = [(m.arrival, 1) for m in requests if m.token_times]
    changes += [(m.token_times[-1], -1) for m in requests if m.token_times]
    present = most = 0
    for _, change in sorted(changes):  # at one and the same moment, leaving comes before arriving
        present += change
        most = max(most, present)
    return most
