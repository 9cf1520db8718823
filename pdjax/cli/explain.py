"""`pdjax explain`: should I disaggregate at all? On the same chips and the same workload."""

import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from absl import flags

from pdjax.bench import workload_flags
from pdjax.bench.modes import MODES
from pdjax.bench.results import slo_of
from pdjax.cli.command import Command
from pdjax.core.clock import utc_now
from pdjax.core.slo import SLO
from pdjax.explain import text
from pdjax.explain.modes import Variant, variants
from pdjax.explain.page import Asked, report_of
from pdjax.explain.study import Study
from pdjax.explain.trial import Simulator, Trial
from pdjax.explain.verdict import around, at_its_limit, verdict, warnings
from pdjax.flags import config_of, new_flags
from pdjax.formats.strict_json import dumps
from pdjax.host.metrics.capacity import capacity
from pdjax.report.origin import Origin
from pdjax.report.report import report_path
from pdjax.sim.calibration import NAMES, Calibration
from pdjax.sim.links import Link

USAGE = """
pdjax explain: should I disaggregate at all? Modes compared on the same chips and workload.

  pdjax explain --chips=4 --input_len=2048 --output_len=256
  pdjax explain --chips=2 --costs=h100 --goodput=ttft:200 --goodput=tpot:8 --request_rate=6
  pdjax explain --workload=azure:AzureLLMInferenceTrace_conv.csv --num_prompts=500
  pdjax explain --costs=results/bench_steps.json --link_gb_s=50 --memory_gb=80 --assume_model
  pdjax explain --memory --config=configs/one_gpu.py --memory_gb=80 --input_len=2048

The production coordinator serves the workload in the simulation, in each mode: every split of the
chips into prefill and decode engines, replicas that prefill first, replicas with mixed steps of
several budgets, and so on. The output says how much each holds within the SLO, where the winner
changes with the rate and with the SLO, and what holds each back. --out has all numbers, and a
report for readers is written beside it. Steps cost what they were measured to cost; of a model or
hardware that was not measured nothing is said. --memory compares nothing: it says what the config
has room for on such chips, and why. See docs/explain.md.
"""

_FLAGS = new_flags(config="llama3_8b")
_OF: dict[str, Any] = {"flag_values": _FLAGS}
_CHIPS = flags.DEFINE_integer("chips", None, "of all engines; else those of the config", **_OF)
_COSTS = flags.DEFINE_string(
    "costs", "h200", f"of steps: {', '.join(NAMES)}, or a file of experiments.bench_steps", **_OF
)
_USUAL_MS = 0.2
_LINK = flags.DEFINE_float("link_gb_s", None, "GB/s between two chips; else as measured", **_OF)
_LATENCY = flags.DEFINE_float(
    "link_ms", None, f"milliseconds of a transfer, with link_gb_s; else {_USUAL_MS}", **_OF
)
_MEMORY = flags.DEFINE_float("memory_gb", None, "GB of a chip; else as the costs say", **_OF)
_FITS = flags.DEFINE_bool("memory", False, "say what the config has room for, and why", **_OF)
_JAX_SHARE = flags.DEFINE_float(
    "memory_share",
    None,
    "of a chip's memory that JAX may take, with memory; else XLA_PYTHON_CLIENT_MEM_FRACTION, or "
    "JAX's own default on GPUs",
    **_OF,
)
_PROGRAMS = flags.DEFINE_float(
    "programs_gb", None, "GB that programs take beside weights and pools, with memory", **_OF
)
_ASSUME = flags.DEFINE_bool(
    "assume_model", False, "take the model to have the shapes of the costs, unopened", **_OF
)
_MODES = flags.DEFINE_list("modes", list(MODES), f"that are compared, of {', '.join(MODES)}", **_OF)
_BUDGETS = flags.DEFINE_list(
    "budgets", ["512", "1024", "2048"], "tokens of chunks in mixed steps, each a mode", **_OF
)
_GOODPUT = flags.DEFINE_multi_string(
    "goodput",
    ["ttft:300", "tpot:10"],
    "what makes a request good: ttft, tpot, itl or e2el, a colon, ms",
    **_OF,
)
_SCALES = flags.DEFINE_list("slo_scales", ["0.5", "1", "2"], "of the grid of SLOs", **_OF)
_SHARE = flags.DEFINE_float("share", 0.9, "of the requests that must be good", **_OF)
_RESOLUTION = flags.DEFINE_float("resolution", 0.1, "of capacities, relative", **_OF)
_RATES = flags.DEFINE_list(
    "rates", [], "measure all modes at these, too; else at some around the best capacity", **_OF
)
_JSON = flags.DEFINE_bool("json", False, "print the numbers as JSON instead of tables", **_OF)
_OUT = flags.DEFINE_string("out", "results/explain.json", "numbers to write", **_OF)
_REPORT = flags.DEFINE_string(
    "report", None, "HTML page to write, none if empty; else report.html in a folder of out", **_OF
)
workload_flags.define(_FLAGS)


def explain() -> None:
    """`pdjax explain`."""
    if _FITS.value:
        return _explain_memory()
    for flag in (_JAX_SHARE, _PROGRAMS):
        if flag.value is not None:
            raise ValueError(f"{flag.name}={flag.value:g}: is of --memory")
    tell = _on_stderr if _JSON.value else print
    slo, scales, rates = _slo(), _numbers("slo_scales"), _numbers("rates")
    calibration = _calibration()
    config = config_of(_FLAGS)
    from pdjax.explain.model import spec_of  # starts JAX

    spec = spec_of(config, calibration, bool(_ASSUME.value))
    longest = config.model.max_model_len or spec.context
    chips = config.devices if _CHIPS.value is None else _CHIPS.value
    modes = variants(config, chips, _budgets(), _MODES.value or [])
    start = _rate()
    simulator = Simulator(calibration, spec, slo, longest)

    def run(mode: Variant, rate: float) -> Trial:
        made = workload_flags.made(_FLAGS, rate)
        return simulator.run(mode, rate, workload_flags.cut(_FLAGS, made, longest).arrivals)

    origin = Origin.here(
        ["pdjax", "explain", *sys.argv[2:]],
        f"simulated: {chips} x {calibration.hardware}",
        _FLAGS["seed"].value,
    )
    study = Study(modes, run, share=_SHARE.value or 0.0, tell=_on_stderr)
    resolution = _RESOLUTION.value or 0.0
    study.search(start, resolution)
    study.sweep(rates or study.grid)
    asked = Asked(slo, scales, start, resolution, chips, calibration, workload_flags.asked(_FLAGS))
    whole = _whole(study, asked, origin, config)
    out = Path(_OUT.value or "")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(dumps(whole, indent=1) + "\n", "utf-8")
    tell(f"saved {out}")
    if path := report_path(_REPORT.value, out):
        report_of(study, asked, origin, whole["config"]).save(path, tell)
    # Last: whoever reads this may close the pipe before its end.
    if _JSON.value:
        print(dumps(whole, indent=1))
    else:
        print("\n".join(_lines(study, asked)))


_COMPARING = (
    *("chips", "link_gb_s", "link_ms", "assume_model", "modes", "budgets", "goodput", "slo_scales"),
    *("share", "resolution", "rates", "out", "report"),
)
"""The flags that say nothing of memory."""


def _explain_memory() -> None:
    """`pdjax explain --memory`."""
    from pdjax.explain import memory  # starts JAX
    from pdjax.explain.model import opened_spec

    for name in _COMPARING:
        if _FLAGS[name].present:
            raise ValueError(f"{name}: is of a comparison; changes nothing with --memory")
    config = config_of(_FLAGS)
    config = replace(config, colocated=bool(config.colocated))
    if _MEMORY.value is None:
        chip = Calibration.load(_COSTS.value or "").memory_bytes
    else:
        chip = _MEMORY.value * 1e9
    if chip is None or not 0 < chip < math.inf:
        raise ValueError(
            f"memory_gb={_MEMORY.value}: must be more than 0, and given where --costs "
            "names a file that does not say it"
        )
    spec = opened_spec(config)
    context = config.model.max_model_len or spec.context
    workload = workload_flags.cut(_FLAGS, workload_flags.made(_FLAGS), context)
    plan = memory.plan_memory(
        config,
        spec,
        context,
        [memory.Lengths.of(workload.arrivals), memory.Lengths.longest(context)],
        chip_bytes=int(chip),
        share=memory.share_of_jax() if _JAX_SHARE.value is None else _JAX_SHARE.value,
        program_bytes=None if _PROGRAMS.value is None else int(_PROGRAMS.value * 1e9),
    )
    print(dumps(plan.to_json(), indent=1) if _JSON.value else "\n".join(memory.lines_of(plan)))


def _on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _slo() -> SLO:
    slo = slo_of(_GOODPUT.value or ())
    if slo is None:
        raise ValueError("goodput: must say what makes a request good")
    capacity([], _SHARE.value or 0.0)
    if not 0 < (_RESOLUTION.value or 0.0) < 1:
        raise ValueError(f"resolution={_RESOLUTION.value}: must be in (0, 1)")
    if not _OUT.value:
        raise ValueError("out='': must name a file to write")
    return slo


def _numbers(name: str) -> list[float]:
    """The numbers of a flag, in order and each once."""
    given = _FLAGS[name].value or []
    try:
        found = sorted({float(each) for each in given})
    except ValueError as error:
        raise ValueError(f"{name}={','.join(given)}: must be numbers") from error
    if found and not 0 < found[0] <= found[-1] < math.inf:
        raise ValueError(f"{name}={','.join(given)}: must be more than 0, and finite")
    if name == "slo_scales" and not found:
        raise ValueError("slo_scales: must have one at least")
    return found


def _budgets() -> list[int]:
    try:
        return sorted({int(each) for each in _BUDGETS.value or []})
    except ValueError as error:
        raise ValueError(f"budgets={','.join(_BUDGETS.value or [])}: must be tokens") from error


def _calibration() -> Calibration:
    found = Calibration.load(_COSTS.value or "")
    latency = _LATENCY.value
    if _LINK.value is not None:
        latency = _USUAL_MS if latency is None else latency
        found = found.with_link(Link(_LINK.value * 1e9, latency / 1e3))
    elif latency is not None:
        raise ValueError(f"link_ms={latency:g}: is of a link that is given; say --link_gb_s, too")
    if _MEMORY.value is not None:
        found = found.with_memory(_MEMORY.value * 1e9)
    return found


def _rate() -> float:
    """Requests a second of the workload; all of it is known to be right before anything is run."""
    if _FLAGS["max_concurrency"].value is not None:
        raise ValueError("max_concurrency: a closed loop has no rates to compare")
    rate = workload_flags.made(_FLAGS).rate
    if rate == math.inf:
        raise ValueError("request_rate=inf: a search must begin at a finite rate")
    return rate


def _lines(study: Study, asked: Asked) -> list[str]:
    """The comparison for a terminal."""
    standings, cells = study.standings(), study.cells(asked.scales)
    lines = [
        "",
        verdict(study, asked.resolution),
        around(cells),
        *warnings(study),
        "",
        f"Capacity goodput: {asked.slo_text}, {study.share:.0%} of all requests",
        *text.standings_lines(standings),
        "",
        f"At {asked.rate:.3g} requests a second",
        *text.trial_lines(study.trial(each.mode, asked.rate) for each in standings),
        "",
        "The winner by rate",
        *text.reign_lines(study),
        "",
        "The winner by SLO, with its capacity goodput",
        *text.cell_lines(cells),
        "",
        "What holds each back, at the first rate that it does not hold",
    ]
    for each in standings:
        found = at_its_limit(study, each)
        lines += [f"{each.mode.name}: {found.name}", *(f"  {line}" for line in found.sentences)]
    return [*lines, "", "Costs", *asked.calibration.validity(), *asked.calibration.sources]


def _whole(study: Study, asked: Asked, origin: Origin, config: Any) -> dict[str, Any]:
    """All numbers."""
    return {
        "date": utc_now(),
        "verdict": verdict(study, asked.resolution),
        "warnings": warnings(study),
        "slo": {name: most and most * 1e3 for name, most in asdict(asked.slo).items()},
        "share": study.share,
        "chips": asked.chips,
        "request_rate": asked.rate,
        **study.to_json(asked.scales, asked.chips),
        "bottlenecks": {
            each.mode.name: asdict(at_its_limit(study, each)) for each in study.standings()
        },
        "costs": {
            "name": asked.calibration.name,
            "hardware": asked.calibration.hardware,
            "model": asked.calibration.model,
            "sources": asked.calibration.sources,
            "validity": asked.calibration.validity(),
            "coefficients": asdict(asked.calibration.costs),
            "link": asdict(asked.calibration.link) if asked.calibration.link else None,
            "points": [{**p._asdict(), "error": p.error} for p in asked.calibration.points],
        },
        "seed": origin.seed,
        "workload": dict(asked.workload),
        "config": asdict(config),
        "versions": dict(origin.versions),
        "commit": origin.commit,
        "command": list(origin.command),
    }


COMMAND = Command(explain, _FLAGS, USAGE)
