"""`pdjax bench`: play a workload to a config or to a server, and write what became of it."""

import json
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from absl import flags

from pdjax.bench import results, workload_flags
from pdjax.bench.record import Played, named, record_json
from pdjax.cli.command import Command
from pdjax.config import Config
from pdjax.core.clock import utc_now
from pdjax.core.origin import versions
from pdjax.core.slo import SLO
from pdjax.flags import config_of, new_flags
from pdjax.formats.strict_json import dumps
from pdjax.host.metrics.bench_definitions import BENCH_GROUPS
from pdjax.host.metrics.capacity import Point, capacity, find_capacity
from pdjax.host.metrics.definitions import GROUPS, definitions
from pdjax.report.origin import PACKAGES
from pdjax.workloads.arrival import Arrival
from pdjax.workloads.files import write_workload

USAGE = """
pdjax bench: play a workload to a config or to a server, and write its latencies and goodput.

  pdjax bench --backend=sim --request_rate=8 --goodput=ttft:300 --goodput=tpot:10
  pdjax bench --config=configs/gpu_1p1d.py --request_rate=8 --input_len=2048 --output_len=256
  pdjax bench --url=http://127.0.0.1:8000 --max_concurrency=16 --num_prompts=200
  pdjax bench --backend=sim --rates=4,8,16 --goodput=ttft:300
  pdjax bench --workload=mooncake:conversation_trace.jsonl --spread_s=3 --time_scale=4

Requests come when they are due, whatever has become of those before, and their clocks begin there;
with --max_concurrency each client waits for its answer instead. --out has the results under the
keys of vLLM's serving benchmark, --records a line for each request: see docs/bench.md. Prompts are
token ids, and answers greedy and of the length that is asked for. --backend=sim needs no model and
no device: the config's engines are simulated with constant costs.
"""

_FLAGS = new_flags(config="smollm2")
_OF: dict[str, Any] = {"flag_values": _FLAGS}
_BACKEND = flags.DEFINE_enum(
    "backend", "device", ["device", "sim"], "where a config is served; sim simulates", **_OF
)
_URL = flags.DEFINE_string(
    "url", None, "drive a server with OpenAI's API instead, as http://127.0.0.1:8000", **_OF
)
_MODEL = flags.DEFINE_string("model", None, "what that server calls its model", **_OF)
_VOCAB = flags.DEFINE_integer("vocab_size", 1000, "token ids for it are below this", **_OF)
_KEY = flags.DEFINE_string("api_key_file", None, "file with its key", **_OF)
_TIMEOUT = flags.DEFINE_float("timeout_s", 1800.0, "until one of its answers has failed", **_OF)
_CHIPS = flags.DEFINE_integer("num_gpu", None, "chips that it has, of all phases", **_OF)
_GOODPUT = flags.DEFINE_multi_string(
    "goodput", [], "what makes a request good: ttft, tpot, itl or e2el, a colon, ms", **_OF
)
_WARMUPS = flags.DEFINE_integer("num_warmups", 1, "requests before those that are measured", **_OF)
_RATES = flags.DEFINE_list("rates", [], "a run at each of these requests a second", **_OF)
_SEARCH = flags.DEFINE_bool(
    "find_capacity", False, "search the highest rate with enough good requests", **_OF
)
_SHARE = flags.DEFINE_float("share", 0.9, "of the requests that must be good for that", **_OF)
_RESOLUTION = flags.DEFINE_float("resolution", 0.05, "how near the search comes, relative", **_OF)
_OUT = flags.DEFINE_string("out", "results/bench.json", "results to write", **_OF)
_RECORDS = flags.DEFINE_string("records", None, "JSON lines to write, one a request", **_OF)
_SAVE = flags.DEFINE_string("save_workload", None, "JSON lines to write, to be replayed", **_OF)
_DETAILED = flags.DEFINE_bool("save_detailed", False, "have vLLM's arrays in --out", **_OF)
_LABEL = flags.DEFINE_string("label", None, "of the results", **_OF)
_METADATA = flags.DEFINE_multi_string("metadata", [], "KEY=VALUE for the results", **_OF)
workload_flags.define(_FLAGS)


@dataclass(frozen=True)
class System:
    """What is driven.

    Attributes:
      kind: pdjax, sim, or openai of a URL.
      model: its name.
      context: tokens of the longest request; None of a URL, whose server does not tell it.
      chips: that it has.
      play: has a workload served.
      config: of its engines; None of a URL.
    """

    kind: str
    model: str
    context: int | None
    chips: results.Chips
    play: Callable[[list[Arrival], str], Played]
    config: Config | None


def bench() -> None:
    """`pdjax bench`."""
    slo = results.slo_of(_GOODPUT.value or ())
    rates = _checked_rates(slo)
    metadata = _metadata()
    config = None if _URL.value else config_of(_FLAGS)
    # What is asked for is known to be right before a model is loaded.
    first = workload_flags.made(_FLAGS, rates[0] if rates else None)
    if _SAVE.value:
        write_workload(_SAVE.value, first.arrivals)
        print(f"saved {_SAVE.value}")
    with ExitStack() as held:
        if config is not None:
            room = len(first.arrivals) + (_WARMUPS.value or 0)
            config = replace(config, max_recorded=max(config.max_recorded, room))
        driver = _Driver(_system(config, held), slo)
        if rates or _SEARCH.value:
            found = driver.sweep(rates, first.rate)
        else:
            found = driver.run(None)
            print("\n".join(results.summary_lines(found)))
        driver.save(found | metadata)


def _checked_rates(slo: SLO | None) -> list[float]:
    try:
        rates = sorted({float(rate) for rate in _RATES.value or ()})
    except ValueError as error:
        raise ValueError(f"rates={','.join(_RATES.value or ())}: must be numbers") from error
    if rates and not 0 < rates[0] <= rates[-1] < math.inf:
        raise ValueError(f"rates={','.join(_RATES.value or ())}: must be more than 0, and finite")
    if (rates or _SEARCH.value) and slo is None:
        raise ValueError("goodput: must say what makes a request good where rates are compared")
    if rates and (_SEARCH.value or _FLAGS["request_rate"].value is not None):
        raise ValueError("rates: must not be given with find_capacity or request_rate")
    if (rates or _SEARCH.value) and _FLAGS["max_concurrency"].value is not None:
        raise ValueError("max_concurrency: a closed loop has no rates to compare")
    capacity([], _SHARE.value or 0.0)
    if (_WARMUPS.value or 0) < 0:
        raise ValueError(f"num_warmups={_WARMUPS.value}: must be 0 or more")
    if not _OUT.value:
        raise ValueError("out='': must name a file to write")
    return rates


def _metadata() -> dict[str, str]:
    found = dict[str, str]()
    for item in _METADATA.value or ():
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise ValueError(f"metadata={item!r}: must be KEY=VALUE")
        found[key] = value
    return found


def _system(config: Config | None, held: ExitStack) -> System:
    """What the flags ask for; `held` closes it."""
    if config is None:
        return _server()
    if _BACKEND.value == "sim":
        from pdjax.bench import simulated

        cluster, longest = simulated.cluster_of(config)
        return System(
            "sim",
            config.model.source,
            longest,
            results.Chips.of(config),
            lambda arrivals, salt: simulated.play(cluster, arrivals, salt),
            config,
        )
    from pdjax.bench import in_process
    from pdjax.llm import LLM

    llm = held.enter_context(LLM(config))
    return System(
        "pdjax",
        llm.config.model.source,
        llm.max_model_len,
        results.Chips.of(llm.config),
        lambda arrivals, salt: in_process.play(llm, arrivals, salt),
        llm.config,
    )


def _server() -> System:
    from pdjax.bench import over_url

    key = Path(_KEY.value).read_text("utf-8").strip() if _KEY.value else None
    vocab_size, seconds = _VOCAB.value or 0, _TIMEOUT.value or 0.0
    if not seconds > 0:
        raise ValueError(f"timeout_s={seconds}: must be more than 0")
    target = over_url.Target(_URL.value or "", _MODEL.value, vocab_size, key, seconds)
    model = _MODEL.value or over_url.model_of(target)
    target = replace(target, model=model)
    return System(
        "openai",
        model,
        None,
        results.Chips.of_url(_CHIPS.value),
        lambda arrivals, salt: over_url.play(target, arrivals, salt),
        None,
    )


class _Driver:
    """Plays workloads to a system, and keeps what became of them.

    Args:
      system: what is driven.
      slo: what makes a request good.
    """

    def __init__(self, system: System, slo: SLO | None) -> None:
        self._system, self._slo = system, slo
        self._date, self._runs = utc_now(), 0
        self._lines: list[str] = []  # of the records

    def run(self, rate: float | None) -> dict[str, Any]:
        """One run, after a warm-up if it is the first; `rate`: in place of `--request_rate`."""
        made, system = workload_flags.made(_FLAGS, rate), self._system
        arrivals = workload_flags.cut(_FLAGS, made.arrivals, system.context)
        warmups = 0
        if not self._runs and _WARMUPS.value:
            warm = [each for each in arrivals if not each.after][: _WARMUPS.value]
            # One after the other, and before the clock of anything that is measured.
            chain = [
                replace(each, moment=0.0, id=f"w{i}", after=f"w{i - 1}" if i else "")
                for i, each in enumerate(warm)
            ]
            warmups = len(chain)
            self._keep(system.play(chain, "warm-up "), "warmup")
        # Another salt: no run finds the prompts of the one before in a prefix cache.
        tag = f"{self._runs}." if self._runs else ""
        self._runs += 1
        played = system.play(named(arrivals, tag), f"run {tag} ")
        self._keep(played, "profiling")
        if errors := [record.error for record in played.records if record.error]:
            print(f"{len(errors)} not served; the first: {errors[0]}", file=sys.stderr)
        found = results.run_results(played, self._slo, system.chips)
        offered = made.rate if rate is None else rate
        found |= {
            "num_warmups": warmups,
            "request_rate": "inf" if offered == math.inf else offered,
            "burstiness": made.burstiness if made.burstiness != math.inf else "inf",
            "max_concurrency": made.clients,
        }
        if _DETAILED.value:
            found |= results.details(played)
        return found

    def sweep(self, rates: list[float], start: float) -> dict[str, Any]:
        """Runs at some rates, or a search that begins at `start`; the results of the run at the
        capacity, or else of the slowest, with all of them."""
        runs = dict[float, dict[str, Any]]()

        def measure(rate: float) -> Point:
            runs[rate] = found = self.run(rate)
            point = results.point_of(rate, found)
            print(f"{rate:.4g} requests/s: {point.good} of {point.total} good", flush=True)
            return point

        share = _SHARE.value or 0.0
        if rates:
            compared = capacity([measure(rate) for rate in rates], share)
        else:
            if start == math.inf:
                raise ValueError("request_rate=inf: a search must begin at a finite rate")
            compared = find_capacity(measure, start, share, resolution=_RESOLUTION.value or 0.0)
        told = compared.to_json(self._system.chips.all)
        print("\n".join(results.capacity_lines(told, list(runs.values()))))
        shown = compared.best or compared.points[0]
        kept = [runs[rate] for rate in sorted(runs)]
        return {**runs[shown.rate], "capacity": told, "runs": kept}

    def save(self, found: dict[str, Any]) -> None:
        """Write the results and the records."""
        system, groups = self._system, {k: v for k, v in GROUPS.items() if k != "requests"}
        whole = {
            "date": self._date,
            "endpoint_type": system.kind,
            "backend": system.kind,
            "label": _LABEL.value,
            "model_id": system.model,
            "tokenizer_id": system.model,
            **found,
            "seed": _FLAGS["seed"].value,
            "workload": workload_flags.asked(_FLAGS),
            "config": None if system.config is None else _plain(asdict(system.config)),
            "versions": versions(*PACKAGES),
            "command": ["pdjax", "bench", *sys.argv[2:]],
            "definitions": definitions(groups | BENCH_GROUPS),
        }
        _write(_OUT.value or "", dumps(whole, indent=1) + "\n")
        if _RECORDS.value:
            _write(_RECORDS.value, "".join(f"{line}\n" for line in self._lines))

    def _keep(self, played: Played, phase: str) -> None:
        if _RECORDS.value:
            self._lines += [
                dumps(record_json(record, played, phase, self._slo)) for record in played.records
            ]


def _plain(value: Any) -> Any:
    return json.loads(dumps(value, default=str))


def _write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, "utf-8")
    print(f"saved {path}")


COMMAND = Command(bench, _FLAGS, USAGE)
