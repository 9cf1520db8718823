"""How does prefill affect the time between tokens of sequences that decode?

Rows of the same length decode twice on the same devices: alone in a quiet phase, and in a loaded
phase beside long prompts that come back to back. These intruders are prefilled, handed over and
answered by a few tokens; when one has its answer, the next is submitted. Each mode has a new LLM:

  disaggregated  the intruders are prefilled on a device of their own
  colocated      one device does both, in chunks of --chunk tokens (the rival: chunked prefill)

Every gap between two tokens of a row counts; the first ticks of a phase are dropped. Weights and
prompts are random.

  python -m experiments.interference --model=llama3_8b --plot=results/interference.png
  python -m experiments.interference --model=tiny --rows=3 --prompt=24 --long=80 --chunk=32

Any field of the configs may be overridden, as in --config.handoff.streaming=False; the colocated
config ignores the fields of `handoff` about the movement of KV. Prints tables, writes JSON, and a
picture with --plot.
"""

import gc
from dataclasses import asdict
from pathlib import Path
from typing import Any

from absl import flags

from experiments.baselines.vllm import BESIDE_PREFILL
from experiments.common.config_fields import config_fields, define_config_fields
from experiments.common.llm_engines import PREFILL, engines_of
from experiments.common.origin import origin, save
from experiments.common.programs import clear_programs
from experiments.common.shapes import MODELS, SHAPES, chosen_model
from experiments.common.tables import megabytes, number, percent, table
from experiments.interference.load import MODES, Load, make_config
from experiments.interference.phases import Intruders, Watch
from experiments.interference.picture import PHASES, draw
from pdjax import LLM, Config
from pdjax.flags import new_flags, run

FLAGS = new_flags()
_MODEL = flags.DEFINE_enum("model", None, list(MODELS), SHAPES, flag_values=FLAGS)
_ROWS = flags.DEFINE_integer("rows", 64, "rows that decode all the time", flag_values=FLAGS)
_PROMPT = flags.DEFINE_integer("prompt", 1024, "tokens of a row's prompt", flag_values=FLAGS)
_LONG = flags.DEFINE_integer("long", 8192, "tokens of an intruder's prompt", flag_values=FLAGS)
_LONG_OUTPUT = flags.DEFINE_integer(
    "long_output", 4, "tokens of an intruder's answer", flag_values=FLAGS
)
_INTRUDERS = flags.DEFINE_integer(
    "intruders", 2, "intruders at once, waiting or not", flag_values=FLAGS
)
_SPARE = flags.DEFINE_integer("spare", 8, "further rows, for intruders", flag_values=FLAGS)
_STEPS = flags.DEFINE_integer("steps", 200, "gaps a row and phase", flag_values=FLAGS)
_WARM = flags.DEFINE_integer("warm", 20, "ticks dropped as a phase begins", flag_values=FLAGS)
_CHUNK = flags.DEFINE_integer("chunk", 2048, "tokens of a colocated step", flag_values=FLAGS)
_BUDGET = flags.DEFINE_integer(
    "budget",
    None,
    "tokens of a disaggregated prefill step; --chunk unless given",
    flag_values=FLAGS,
)
_MODES = flags.DEFINE_multi_enum("modes", list(MODES), MODES, "modes to run", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "results/interference.json", "file to write", flag_values=FLAGS)
_PLOT = flags.DEFINE_string("plot", None, "file of a picture; needs matplotlib", flag_values=FLAGS)
define_config_fields(FLAGS)


def measure(config: Config, load: Load) -> dict[str, Any]:
    """Measure both phases of a mode."""
    gc.collect()  # frees device memory of the last mode
    clear_programs()
    with LLM(config) as llm:
        llm.coordinator.warm_up()
        gc.collect()
        gc.freeze()  # as a server does: a collection over all compiled objects would delay a token
        watch = Watch(llm, load)
        try:
            quiet, loaded = watch.phase(), watch.phase(Intruders(llm, load))
        finally:
            gc.unfreeze()
        seen: dict[str, Any] = {"quiet": quiet, "loaded": loaded}
        seen["layer_groups"] = len(engines_of(llm, PREFILL)[0].layer_groups)
        for request_id in [entry.request.id for entry in llm.session.book.entries]:
            llm.abort(request_id)
    llm.coordinator.check()
    return seen


def show(whole: dict[str, Any]) -> str:
    """Make the tables and the summary."""
    points = {f"{mode} {p}": seen[p] for mode, seen in whole["modes"].items() for p in PHASES}
    keys = ("p50", "p90", "p99", "max")
    gaps = [
        [
            name,
            *(number(seen["itl_ms"][key], 2) for key in keys),
            percent(seen["host_busy"]),
            *(number(ms) for ms in (whole["vllm"]["itl_ms"][name] if whole["vllm"] else ())),
        ]
        for name, seen in points.items()
    ]
    loaded = {mode: seen["loaded"] for mode, seen in whole["modes"].items()}
    intruders = [
        [
            mode,
            str(seen["intruders"]["finished"]),
            *(number(seen["intruders"]["ttft_ms"][key], 0) for key in ("p50", "p99")),
            number(seen["intruders"]["prefill_ms"], 0),
            number(seen["intruders"]["prefill_tokens_per_s"], 0),
            str(seen["transfers"]["transfers"]),
            megabytes(seen["transfers"]["bytes_each"]),
            number(seen["transfers"]["exposed_ms_each"], 2),
            percent(seen["transfers"]["hidden"]),
            number(seen["transfers"]["layout_changing_puts"], 0),
        ]
        for mode, seen in loaded.items()
    ]
    head = ["time between tokens, ms", *keys, "host busy"]
    head += ["vLLM p50", "p99", "max"] if whole["vllm"] else []
    asked = ["intruders", "finished", "TTFT p50, ms", "p99", "prefill, ms", "tokens/s"]
    moved = ["hand-offs", "MB each", "exposed, ms", "hidden", "layout changes"]
    return "\n\n".join(
        [
            table(head, gaps),
            table([*asked, *moved], intruders),
            *map(headline, whole["modes"].items()),
        ]
    )


def headline(of: tuple[str, dict[str, Any]]) -> str:
    """Summarize a (mode, its phases) in one line."""
    mode, seen = of
    quiet, loaded = (seen[phase]["itl_ms"]["p99"] for phase in PHASES)
    return f"{mode}: p99 {loaded:.2f} ms under load, {quiet:.2f} quiet: {loaded / quiet:.2f} times"


def main() -> None:
    """Measure, print, save; see the module."""
    names = ("rows", "prompt", "long", "long_output", "intruders", "spare", "steps", "warm")
    sizes: dict[str, Any] = {name: FLAGS[name].value for name in names}
    load, chunk = Load(**sizes), _CHUNK.value or 0
    overrides = config_fields(FLAGS)
    model = chosen_model(_MODEL.value, make_config("tiny", MODES[0], load, chunk, overrides))
    budgets = {"disaggregated": chunk if _BUDGET.value is None else _BUDGET.value}
    modes: dict[str, dict[str, Any]] = {}
    for mode in dict.fromkeys(_MODES.value or ()):
        config = make_config(model, mode, load, budgets.get(mode, chunk), overrides)
        modes[mode] = {"budget": config.prefill.token_budget} | measure(config, load)
        print(headline((mode, modes[mode])), flush=True)
    point = {"model": model, **asdict(load)}
    comparable = BESIDE_PREFILL["point"].items() <= point.items()
    whole = {
        "model": model,
        "load": asdict(load),
        "modes": modes,
        "vllm": BESIDE_PREFILL if comparable else None,
        **origin(),
    }
    print(show(whole))
    save(whole, _OUT.value)
    if _PLOT.value:
        draw(whole, Path(_PLOT.value))


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
