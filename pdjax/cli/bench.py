"""`pdjax bench`: play a workload to a config or to a server, and write what became of it."""

import json
import math
import secrets
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from absl import flags

from pdjax.bench import results, workload_flags
from pdjax.bench.driver import Driver, compare_rates
from pdjax.bench.page import report_of
from pdjax.bench.system import System, device_system, server_system, simulated_system
from pdjax.cli.command import Command
from pdjax.config import Config
from pdjax.core.clock import utc_now
from pdjax.core.origin import versions
from pdjax.flags import config_of, new_flags
from pdjax.formats.strict_json import dumps
from pdjax.host.metrics.bench_definitions import BENCH_GROUPS
from pdjax.host.metrics.capacity import capacity
from pdjax.host.metrics.definitions import GROUPS, definitions
from pdjax.report.origin import PACKAGES, Origin
from pdjax.report.report import report_path
from pdjax.sim.calibration import NAMES, Calibration
from pdjax.workloads.files import write_workload

USAGE = """
pdjax bench: play a workload to a config or to a server, and write its latencies and goodput.

  pdjax bench --backend=sim --request_rate=8 --goodput=ttft:300 --goodput=tpot:10
  pdjax bench --backend=sim --config=llama3_8b --costs=h200 --request_rate=8
  pdjax bench --config=configs/gpu_1p1d.py --request_rate=8 --input_len=2048 --output_len=256
  pdjax bench --url=http://127.0.0.1:8000 --max_concurrency=16 --num_prompts=200
  pdjax bench --backend=sim --rates=4,8,16 --goodput=ttft:300
  pdjax bench --workload=mooncake:conversation_trace.jsonl --spread_s=3 --time_scale=4

Requests come when they are due, whatever has become of those before, and their clocks begin there;
with --max_concurrency each client waits for its answer instead. --out has the results under the
keys of vLLM's serving benchmark, --records a line for each request: see docs/bench.md. Prompts are
token ids, and answers greedy and of the length that is asked for. --backend=sim needs no model and
no device: the config's engines are simulated, with constant costs unless --costs names measured
ones, which must be of the config's model. What steps cost is printed and in the report.
"""

_FLAGS = new_flags(config="smollm2")
_OF: dict[str, Any] = {"flag_values": _FLAGS}
_BACKEND = flags.DEFINE_enum(
    "backend", "device", ["device", "sim"], "where a config is served; sim simulates", **_OF
)
_COSTS = flags.DEFINE_string(
    "costs",
    None,
    f"of simulated steps: {', '.join(NAMES)}, or a file of experiments.bench_steps; else constants",
    **_OF,
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
_SALT = flags.DEFINE_string(
    "salt",
    None,
    "of prompts: runs of one salt have the same, which a prefix cache may have (default: of a "
    "server another each time, else none)",
    **_OF,
)
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
_REPORT = flags.DEFINE_string(
    "report", None, "HTML page to write, none if empty; else report.html in a folder of out", **_OF
)
workload_flags.define(_FLAGS)


_OF_URL = ("model", "vocab_size", "api_key_file", "timeout_s", "num_gpu")
"""The flags that only a server at a URL goes by."""


def bench() -> None:
    """`pdjax bench`."""
    _check_given()
    slo = results.slo_of(_GOODPUT.value or ())
    rates = _checked_rates()
    metadata = _metadata()
    config = None if _URL.value else config_of(_FLAGS)
    # What is asked for is known to be right before a model is loaded.
    first = workload_flags.made(_FLAGS, rates[0] if rates else None)
    compared = bool(rates or _SEARCH.value)
    if compared and slo is None and all(each.slo is None for each in first.arrivals):
        raise ValueError("goodput: must say what makes a request good where rates are compared")
    if _SAVE.value:
        write_workload(_SAVE.value, first.arrivals)
        print(f"saved {_SAVE.value}")
    date, salt = utc_now(), _salt()
    with ExitStack() as held:
        if config is not None:
            room = len(first.arrivals) + (_WARMUPS.value or 0)
            config = replace(config, max_recorded=max(config.max_recorded, room))
        system = _system(config, held)
        if system.costs is not None:
            print("\n".join([system.hardware, *system.costs["sentences"], ""]))
        driver = Driver(
            system,
            slo,
            warmups=_WARMUPS.value or 0,
            salt=salt,
            keep=bool(_RECORDS.value) or _REPORT.value != "",
            detailed=bool(_DETAILED.value),
        )

        def run(rate: float | None) -> dict[str, Any]:
            made = workload_flags.made(_FLAGS, rate)
            found = driver.run(workload_flags.cut(_FLAGS, made, system.context))
            return found if rate is None else found | {"request_rate": rate}

        if compared:
            found = compare_rates(
                run,
                rates,
                start=first.rate,
                share=_SHARE.value or 0.0,
                resolution=_RESOLUTION.value or 0.0,
                chips=system.chips.all,
            )
            print("\n".join(results.capacity_lines(found["capacity"], found["runs"])))
        else:
            found = run(None)
            print("\n".join(results.summary_lines(found)))
        _save(system, {"date": date, "salt": salt, **found, **metadata}, driver.records)


def _check_given() -> None:
    """Refuse flags that were given and that this command does not go by."""
    idle: dict[str, tuple[str, ...]] = {}
    if not _URL.value:
        idle["without url"] = _OF_URL
    if _URL.value or _BACKEND.value != "sim":
        idle["without backend=sim"] = ("costs",)
    if not _SEARCH.value:
        idle["without find_capacity"] = ("resolution",)
    if not (_SEARCH.value or _RATES.value):
        idle["without rates or find_capacity"] = ("share",)
    for why, names in idle.items():
        for name in names:
            if _FLAGS[name].present:
                raise ValueError(f"{name}={_FLAGS[name].value}: changes nothing {why}")


def _checked_rates() -> list[float]:
    try:
        rates = sorted({float(rate) for rate in _RATES.value or ()})
    except ValueError as error:
        raise ValueError(f"rates={','.join(_RATES.value or ())}: must be numbers") from error
    if rates and not 0 < rates[0] <= rates[-1] < math.inf:
        raise ValueError(f"rates={','.join(_RATES.value or ())}: must be more than 0, and finite")
    if rates and (_SEARCH.value or _FLAGS["request_rate"].value is not None):
        raise ValueError("rates: must not be given with find_capacity or request_rate")
    if (rates or _SEARCH.value) and _FLAGS["max_concurrency"].value is not None:
        raise ValueError("max_concurrency: a closed loop has no rates to compare")
    capacity([], _SHARE.value or 0.0)
    if not 0 < (_RESOLUTION.value or 0.0) < math.inf:
        raise ValueError(f"resolution={_RESOLUTION.value}: must be more than 0, and finite")
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
        key = Path(_KEY.value).read_text("utf-8").strip() if _KEY.value else None
        return server_system(
            _URL.value or "",
            model=_MODEL.value,
            vocab_size=_VOCAB.value or 0,
            api_key=key,
            timeout_s=_TIMEOUT.value or 0.0,
            chips=_CHIPS.value,
        )
    if _BACKEND.value == "sim":
        costs = None if _COSTS.value is None else Calibration.load(_COSTS.value)
        return simulated_system(config, costs)
    return held.enter_context(device_system(config))


def _salt() -> str:
    """Of this command's prompts. A server has served before: its prefix cache may have the prompts
    of another command, unless they are told apart."""
    if _SALT.value is not None:
        return _SALT.value
    return secrets.token_hex(4) if _URL.value else ""


def _save(system: System, found: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write the results and the records."""
    groups = {k: v for k, v in GROUPS.items() if k != "requests"}
    whole = {
        "endpoint_type": system.kind,
        "backend": system.kind,
        "label": _LABEL.value,
        "model_id": system.model,
        "tokenizer_id": system.model,
        **found,
        "seed": _FLAGS["seed"].value,
        "workload": workload_flags.asked(_FLAGS),
        "config": None if system.config is None else _plain(asdict(system.config)),
        "costs": system.costs,
        "versions": versions(*PACKAGES),
        "command": ["pdjax", "bench", *sys.argv[2:]],
        "definitions": definitions(groups | BENCH_GROUPS),
    }
    _write(_OUT.value or "", dumps(whole, indent=1) + "\n")
    if _RECORDS.value:
        _write(_RECORDS.value, "".join(f"{dumps(line)}\n" for line in records))
    if path := report_path(_REPORT.value, _OUT.value or ""):
        command, seed = whole["command"], whole["seed"]
        report_of(whole, records, Origin.here(command, system.hardware, seed)).save(path)


def _plain(value: Any) -> Any:
    return json.loads(dumps(value, default=str))


def _write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, "utf-8")
    print(f"saved {path}")


COMMAND = Command(bench, _FLAGS, USAGE)
