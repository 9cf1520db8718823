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
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.baselines.vllm import BESIDE_PREFILL
from experiments.common.config_fields import config_fields, define_config_fields
from experiments.common.llm_engines import PREFILL, decode_held_back, engines_of
from experiments.common.origin import origin, save
from experiments.common.shapes import MODELS, SHAPES, chosen_model
from experiments.common.step_times import IDLE, POLLS, StepTimes
from experiments.common.tables import megabytes, number, percent, table
from experiments.interference.load import MODES, Load, make_config
from experiments.interference.picture import PHASES, SHARES, draw
from pdjax import LLM, Config, SamplingParams
from pdjax.flags import new_flags, run
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.request import RequestMetrics
from pdjax.host.sequences import sequence as states

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


def measure(config: Config, load: Load) -> dict[str, Any]:
    """Measure both phases of a mode."""
    gc.collect()  # frees device memory of the last mode
    jax.clear_caches()
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
        for request_id in [entry.request.id for entry in llm.session.entries]:
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
