"""The results of a benchmark, under the keys of the field; what each means says
`host/metrics/definitions.py`."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from pdjax.bench.record import Played, slo_json
from pdjax.config import Config
from pdjax.core.slo import SLO
from pdjax.host.metrics.bench_definitions import PERCENTILES
from pdjax.host.metrics.capacity import Point
from pdjax.host.metrics.request import in_ms
from pdjax.host.metrics.summary import summarize


@dataclass(frozen=True)
class Chips:
    """How many chips there are, and what for.

    Attributes:
      all: of both phases; None of a server at a URL without `--num_gpu`.
      of_phases: the keys of the field, from `disagg` to `decode_num_workers`.
    """

    all: int | None
    of_phases: Mapping[str, Any]

    @classmethod
    def of(cls, config: Config) -> "Chips":
        """Chips of a config's engines."""
        prefill, decode = config.prefill, config.decode
        apart = not (config.colocated or config.shared_devices)
        first, second = prefill.engines * prefill.tp, decode.engines * decode.stages * decode.tp
        phases = {
            "disagg": apart,
            "num_prefill_gpu": first,
            "num_decode_gpu": second,
            "prefill_tp": prefill.tp,
            "prefill_num_workers": prefill.engines,
            "decode_tp": decode.tp,
            "decode_num_workers": decode.engines,
        }
        return cls(first + second if apart else max(first, second), phases)

    @classmethod
    def of_url(cls, count: int | None) -> "Chips":
        """Chips of a server at a URL; `count` is `--num_gpu`, None where it is not given."""
        return cls(count, dict.fromkeys(cls.of(Config()).of_phases))


def run_results(played: Played, slo: SLO | None, chips: Chips) -> dict[str, Any]:
    """The numbers of a run: those of `summarize`, of its engines, and those per chip; `slo`: what
    makes a request good that has no bounds of its own."""
    metrics = [record.metrics for record in played.records]
    found = summarize(metrics, [record.slo(slo) for record in played.records], PERCENTILES)
    late = [r.sent - r.metrics.arrival for r in played.records if r.sent is not None]
    cached = sum(m.cached_tokens for m in metrics if m.completed)
    duration = found["duration"]
    inputs = found["total_input_tokens"] / duration if duration > 0 else None
    errors = Counter(
        (record.error or "").partition(":")[0] for record in played.records if record.error
    )
    return {
        **found,
        **played.work,
        "num_prompts": len(played.records),
        "mean_late_ms": in_ms(sum(late) / len(late)) if late else None,
        "max_late_ms": in_ms(max(late, default=None)),
        "total_cached_tokens": cached if played.knows_cache else None,
        "rtfx": 0.0,
        **chips.of_phases,
        "num_gpu": chips.all,
        "tput_per_gpu": _per(found["total_token_throughput"], chips.all),
        "output_tput_per_gpu": _per(found["output_throughput"], chips.all),
        "input_tput_per_gpu": _per(inputs, chips.all),
        "goodput_per_gpu": _per(found["request_goodput"], chips.all),
        **{
            f"{name}_intvty": 1000 / tpot if (tpot := found[f"{name}_tpot_ms"]) else None
            for name in ("mean", "median", "p99")
        },
        "slo": slo_json(slo),
        "errors_by_reason": dict(errors.most_common()),
        "capacity": None,
        "runs": None,
    }


def _per(value: float | None, chips: int | None) -> float | None:
    return value / chips if value is not None and chips else None


def details(played: Played) -> dict[str, Any]:
    """The arrays of vLLM's `--save-detailed`, seconds."""
    metrics = [record.metrics for record in played.records]
    return {
        "input_lens": [m.prompt_tokens for m in metrics],
        "output_lens": [m.output_tokens if m.completed else 0 for m in metrics],
        "ttfts": [m.ttft or 0.0 for m in metrics],
        "itls": [list(m.itl) for m in metrics],
        "start_times": [m.arrival - played.start for m in metrics],
        "generated_texts": [""] * len(metrics),
        "errors": [record.error or "" for record in played.records],
    }


def point_of(rate: float, found: Mapping[str, Any]) -> Point:
    """What a run says to a search for capacity."""
    return Point(rate, found["slo_good"], found["slo_total"])


def slo_of(bounds: Iterable[str]) -> SLO | None:
    """Read bounds such as "ttft:300" and "tpot:10", milliseconds; None of no bounds.

    Raises:
      ValueError: no such bound, or one given twice.
    """
    names = ("ttft", "tpot", "itl", "e2el")
    found = dict[str, float]()
    for bound in bounds:
        name, _, most = bound.partition(":")
        try:
            seconds = float(most) / 1e3
        except ValueError:
            seconds = math.nan
        if name not in names or name in found or not 0 < seconds < math.inf:
            raise ValueError(
                f"goodput={bound!r}: must be one of {', '.join(names)}, each once, and "
                "milliseconds, as ttft:300"
            )
        found[name] = seconds
    return SLO(**found) if found else None


def summary_lines(found: Mapping[str, Any]) -> list[str]:
    """The most important numbers, for a terminal."""

    def row(name: str, *values: Any) -> str:
        told = ("-" if v is None else v if isinstance(v, str) else f"{v:,.4g}" for v in values)
        return f"{name:<24}" + "".join(f"{value:>12}" for value in told)

    kinds = ("mean", "median", *(f"p{n}" for n in PERCENTILES))
    lines = [row("ms", *kinds)]
    for name, key in (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("E2E", "e2el")):
        lines.append(row(name, *(found[f"{kind}_{key}_ms"] for kind in kinds)))
    counts = [f"{found[key]} {key}" for key in ("completed", "failed", "shed", "aborted")]
    lines += ["", f"{', '.join(counts)} in {found['duration']:.4g} s"]
    lines.append(
        f"{_told(found['request_throughput'])} requests/s, "
        f"{_told(found['output_throughput'])} output tokens/s, "
        f"{_told(found['tput_per_gpu'])} tokens/s a chip"
    )
    if found["slo"] is not None:
        lines.append(
            f"goodput {_told(found['request_goodput'])} requests/s; good are "
            f"{found['slo_good']} of {found['slo_total']} ({_told(found['slo_attainment'], 100)}%)"
        )
    return lines


def _told(value: float | None, times: float = 1.0) -> str:
    return "-" if value is None else f"{value * times:,.4g}"


def capacity_lines(capacity: Mapping[str, Any], runs: Seq[Mapping[str, Any]]) -> list[str]:
    """A line for each rate, and the capacity, for a terminal."""
    lines = [
        f"{'requests/s':>12}{'good':>8}{'of':>8}{'p90 TTFT':>12}{'p90 TPOT':>12}{'p99 ITL':>12}"
    ]
    by_rate = sorted(runs, key=lambda run: float(run["request_rate"]))
    for run in by_rate:
        ttft, tpot, itl = (_told(run[key]) for key in ("p90_ttft_ms", "p90_tpot_ms", "p99_itl_ms"))
        lines.append(
            f"{float(run['request_rate']):>12.4g}{run['slo_good']:>8}{run['slo_total']:>8}"
            f"{ttft:>12}{tpot:>12}{itl:>12}"
        )
    share, rate = capacity["share"], capacity["rate"]
    if rate is None:
        lines.append(f"capacity goodput: none of these rates has {share:.0%} good")
    else:
        lines.append(
            f"capacity goodput: {rate:.4g} requests/s, {capacity['good']} of {capacity['total']} "
            f"good, at least {share:.0%}; interpolated {_told(capacity['interpolated'])}"
        )
    return lines
