"""Are the tokens exact in every mix of prefill and decode on the devices at hand, and how long does
a step take?

A small model with random weights in float32 answers the same prompts greedily: first on one device
that does both phases, which is the truth; then in every mix that the devices allow. "a + b" has
prefill a on devices of its own. "a & b" has both phases on the same devices, each with its own
weights and pools. The other mixes hand over in another way between tp1 and tp1. Prompts are cut
into chunks and streamed in layer groups, unless a mix says otherwise.

  python -m experiments.mixes                               on all accelerators
  python -m experiments.mixes --model=tiny --devices=4      on four virtual CPU devices
  python -m experiments.mixes --mixes=stages --mixes=pages  only those with such a name

Prints a table and writes JSON. Exit status 1 where a token differs or a mix cannot run. In float32
two layouts differ in the last bits, so the table shows by how much the truth preferred its own
token where one differs: a bug shows as a clear preference, a near tie as one of 1e-5 or less.
Attention in float32 uses the reference on GPUs: compare times only with one another. Wire time is
as seen by the host; where the host looks seldom, as on a CPU, the share of the peak means nothing.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import jax
from absl import flags

from experiments.common.llm_engines import DECODE, PREFILL, engines_of
from experiments.common.origin import origin, save
from experiments.common.tables import megabytes, number, percent, table
from experiments.mixes.ways import SCALES, Mix, Scale, chosen, mixes, truth
from pdjax import LLM, Config, RequestOutput, load_config
from pdjax.flags import new_flags, run
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.work import Span

PROBE_BYTES = 64 << 20
"""Bytes of the plain put that measures a link."""

FLAGS = new_flags()
_MODEL = flags.DEFINE_enum(
    "model", "small", list(SCALES), "model and its prompts", flag_values=FLAGS
)
_DEVICES = flags.DEFINE_integer(
    "devices",
    None,
    "devices to use; on a CPU, to make; all devices unless given",
    flag_values=FLAGS,
)
_MIXES = flags.DEFINE_multi_string(
    "mixes", [], "only mixes with this in their name; may be repeated", flag_values=FLAGS
)
_CACHE = flags.DEFINE_string(
    "cache", "", "compilation cache to use; unless given, one for this run", flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", "results/mixes.json", "file to write", flag_values=FLAGS)


def serve(config: Config, scale: Scale, passes: int = 1, logprobs: int | None = None) -> "Served":
    """Answer the prompts, `passes` times, after others that compile everything."""
    gc.collect()  # frees device memory of the last LLM
    began = time.perf_counter()
    with LLM(config) as llm:
        llm.generate(scale.prompts(seed=1), scale.params(4, logprobs), progress=False)
        _wait_until_idle(llm)
        if not config.shared_devices and not config.colocated:
            _measure_links(llm)
        llm.recorder.clear()
        compiled, answers = time.perf_counter(), list[RequestOutput]()
        for _ in range(passes):
            params = scale.params(logprobs=logprobs)
            answers += llm.generate(scale.prompts(seed=0), params, progress=False)
            _wait_until_idle(llm)
        ended = time.perf_counter()
    return Served(answers, llm.recorder, compiled - began, ended - compiled)


def _wait_until_idle(llm: LLM) -> None:
    """Wait for KV that is still being given back; then check that every page is free."""
    while llm.has_work:
        llm.step()
    llm.coordinator.check()


def _measure_links(llm: LLM) -> None:
    """Measure the rate of a plain put between engines on different devices."""
    for source, target in product(engines_of(llm, PREFILL), engines_of(llm, DECODE)):
        pools = source.pool, target.pool
        seconds = llm.transport.measure(*pools, PROBE_BYTES).result()
        llm.recorder.link(*pools).peak = PROBE_BYTES / seconds


@dataclass(frozen=True)
class Served:
    """The answers of all passes, the recorder, and the seconds of the start and of the passes."""

    answers: list[RequestOutput]
    recorder: Recorder
    start_s: float
    serve_s: float

    def to_json(self) -> dict[str, Any]:
        """Return the numbers of the run."""
        spans, totals = self.recorder.spans(), self.recorder.transfers
        links = [link for link in self.recorder.links.values() if link.peak and link.wire_s]
        could = sum(link.wire_s * (link.peak or 0) for link in links)
        return {
            "prefill_ms": step_ms(spans, "prefill/"),
            "tick_ms": step_ms(spans, "decode/"),
            "of_peak": sum(link.bytes for link in links) / could if could else None,
            "transfers": totals.to_json(),
            "start_s": self.start_s,
            "serve_s": self.serve_s,
        }


def step_ms(spans: Iterable[Span], tracks: str) -> float | None:
    """Return the median step time of engines with tracks that begin with `tracks`. A step counts
    from the end of the step before: with lookahead it is dispatched earlier."""
    ends: dict[str, float] = {}
    took = []
    for span in spans:
        if span.track.startswith(tracks):
            took.append(span.end - max(span.start, ends.get(span.track, span.start)))
            ends[span.track] = span.end
    return statistics.median(took) * 1e3 if took else None


def compare(answers: Sequence[RequestOutput], right: Sequence[RequestOutput]) -> dict[str, Any]:
    """Count the answers, and the tokens before the first difference, that equal the truth's, which
    has one pass. `margin` is the largest preference, in nats, of the truth for its own token over
    the next best where they differ; None where none differs."""
    exact = same = total = 0
    margins: list[float] = []
    for answer, true_answer in zip(answers, cycle(right), strict=False):
        agree, pairs = 0, zip(answer.token_ids, true_answer.token_ids, strict=False)
        while (pair := next(pairs, None)) is not None and pair[0] == pair[1]:
            agree += 1
        same, total = same + agree, total + len(true_answer.token_ids)
        exact += answer.token_ids == true_answer.token_ids
        if agree < len(true_answer.token_ids) and true_answer.logprobs:
            (_, best), (_, second), *_ = true_answer.logprobs[agree].top
            margins.append(best - second)
    return {
        "answers": len(answers),
        "exact": exact,
        "tokens": total,
        "tokens_right": same,
        "margin": max(margins, default=None),
    }


def try_mix(
    config: Config, mix: Mix, scale: Scale, right: Sequence[RequestOutput]
) -> dict[str, Any]:
    """Run a mix and make its line of the table. A mix that cannot run gives the reason."""
    changes = {"colocated": False, "handoff.layer_groups": 4, **mix.changes}
    try:
        served = serve(load_config(config, changes), scale, mix.passes)
    except Exception as error:
        return {"mix": mix.name, "error": " ".join(f"{type(error).__name__}: {error}".split())}
    return {"mix": mix.name} | compare(served.answers, right) | served.to_json()


def wrong(row: Mapping[str, Any]) -> bool:
    """Whether a mix broke the promise of exact tokens."""
    return "error" in row or row["exact"] < row["answers"]


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """Make the table, and the errors below it."""
    head = ["mix", "exact", "prefill step, ms", "tick, ms", "MB moved", "of peak"]
    head += ["layout changes", "re-prefilled", "start, s", "serve, s"]
    lines, errors = [], []
    for row in rows:
        if "error" in row:
            lines.append([row["mix"], "failed", *"-" * (len(head) - 2)])
            errors.append(f"{row['mix']}: {row['error']}")
            continue
        moved = row["transfers"]
        lines.append(
            [
                row["mix"],
                f"{row['exact']} of {row['answers']}",
                number(row["prefill_ms"], 2),
                number(row["tick_ms"], 2),
                megabytes(moved["bytes"]),
                percent(row["of_peak"]),
                number(moved["layout_changing_puts"], 0),
                str(moved["reprefilled_tokens"]),
                number(row["start_s"]),
                number(row["serve_s"]),
            ]
        )
        if row["margin"] is not None:
            margin = f"{row['margin']:.1e} nats"
            errors.append(f"{row['mix']}: the truth preferred its own token by up to {margin}")
    return "\n".join([table(head, lines), *errors])


def main() -> int:
    """Run the mixes, print, save; see the module."""
    scale = SCALES[_MODEL.value or ""]
    devices = len(jax.devices()) if _DEVICES.value is None else _DEVICES.value
    if devices < 1:
        raise ValueError(f"devices={devices}: must be at least 1")
    todo = chosen(mixes(devices, scale), _MIXES.value or ())
    with ExitStack() as stack:
        cache = _CACHE.value or stack.enter_context(tempfile.TemporaryDirectory())
        config = truth(scale, devices, cache)
        right = serve(config, scale, logprobs=2)
        rows = [
            {"mix": "one device (truth)"} | compare(right.answers, right.answers) | right.to_json()
        ]
        for mix in todo:
            rows.append(try_mix(config, mix, scale, right.answers))
            print(f"{mix.name}: {'wrong' if wrong(rows[-1]) else 'exact'}", flush=True)
    print(show(rows))
    whole = {"model": _MODEL.value, "devices_used": devices, "mixes": rows} | origin()
    save(whole, _OUT.value)
    return int(any(map(wrong, rows)))


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
