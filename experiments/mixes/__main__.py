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
from dataclasses import dataclass, field
from itertools import cycle, product
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.common.llm_engines import DECODE, PREFILL, engines_of
from experiments.common.origin import origin, save
from experiments.common.tables import megabytes, number, percent, table
from pdjax import LLM, Config, RequestOutput, SamplingParams, load_config
from pdjax.config import RANDOM, DecodeConfig, KVConfig, ModelConfig, PrefillConfig
from pdjax.core.model_spec import ModelSpec
from pdjax.flags import new_flags, run
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.work import Span

PROBE_BYTES = 64 << 20
"""Bytes of the plain put that measures a link."""


@dataclass(frozen=True)
class Scale:
    """A model and its requests.

    Attributes:
      spec: the model's shapes; every tp of 1, 2 and 4 divides them.
      lengths: tokens of the prompts: around a page, around a chunk, several chunks.
      outputs: tokens of the answers, in turns, so that rows become free at different times.
      page_size, budget, rows: fields of the config.
    """

    spec: ModelSpec
    lengths: tuple[int, ...]
    outputs: tuple[int, ...]
    page_size: int
    budget: int
    rows: int = 8

    def prompts(self, seed: int) -> list[list[int]]:
        """Draw random prompts, the same for the same seed."""
        rng = np.random.default_rng(seed)
        return [rng.integers(1, self.spec.vocab_size, n).tolist() for n in self.lengths]

    def params(self, most: int = 1 << 20, logprobs: int | None = None) -> list[SamplingParams]:
        """Make the params of the prompts, for at most `most` tokens each."""
        how: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": logprobs}
        each = [SamplingParams(max_tokens=min(n, most), **how) for n in self.outputs]
        return [params for params, _ in zip(cycle(each), self.lengths, strict=False)]


SCALES = {
    "small": Scale(
        ModelSpec(
            vocab_size=32000,
            num_layers=8,
            model_dim=1024,
            mlp_dim=2816,
            query_heads=16,
            kv_heads=8,
            head_dim=64,
            context=1024,
        ),
        lengths=(5, 600, 16, 17, 129, 31, 450, 64, 100, 511, 127, 256, 40, 383, 200, 300),
        outputs=(48, 24),
        page_size=16,
        budget=128,
    ),
    # small enough that a CPU compiles and runs it in seconds
    "tiny": Scale(
        ModelSpec(
            vocab_size=211,
            num_layers=4,
            model_dim=32,
            mlp_dim=64,
            query_heads=8,
            kv_heads=4,
            head_dim=8,
            context=128,
        ),
        lengths=(1, 60, 4, 5, 17, 8, 45, 16, 10, 51),
        outputs=(12, 6),
        page_size=4,
        budget=16,
        rows=4,
    ),
}


@dataclass(frozen=True)
class Mix:
    """A way to serve: `changes` of the config of the truth, by dotted names.

    It makes `passes` over the same prompts; from the second on, the prefix cache has them.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    passes: int = 1


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


def truth(scale: Scale, devices: int, cache: str | None) -> Config:
    """Make the config of the truth: one device for both phases, one bucket of each kind."""
    # One page more: the coordinator keeps one in reserve for each sequence that decodes.
    longest = max(scale.lengths) + max(scale.outputs) + scale.page_size
    context, sequences = -(-longest // scale.page_size), 4
    return Config(
        model=ModelConfig(source=RANDOM, spec=scale.spec, max_model_len=longest),
        kv=KVConfig(page_size=scale.page_size),
        prefill=PrefillConfig(
            token_budget=scale.budget,
            max_sequences=sequences,
            token_buckets=(scale.budget,),
            page_buckets=(max(context, scale.budget // scale.page_size + sequences),),
        ),
        decode=DecodeConfig(rows=scale.rows, page_buckets=(context,)),
        colocated=True,
        cpu_devices=devices,
        warm_up=False,  # a few prompts compile only the buckets that the others need
        compilation_cache=cache,
    )


def mixes(devices: int, scale: Scale) -> list[Mix]:
    """List the mixes for `devices` devices; they use a power of two, at most the KV heads."""
    most = min(devices, scale.spec.kv_heads)
    n = 1 << (most.bit_length() - 1)
    return [*layouts(n), *handoffs(n, scale)]


def layouts(n: int) -> list[Mix]:
    """List every kind of mesh for either phase, over n devices, a power of two."""
    same = {"shared_devices": True}
    if n == 1:
        return [Mix("tp1 & tp1", same)]
    found = [
        Mix("tp1 + tp1"),
        Mix(f"tp{n} & {n} stages", same | {"prefill.tp": n, "decode.stages": n}),
        Mix(f"tp{n} & tp{n}", same | {"prefill.tp": n, "decode.tp": n}),
        Mix(f"tp1 & {n} stages", same | {"decode.stages": n}),
        Mix(f"tp{n} & tp1", same | {"prefill.tp": n}),
    ]
    if n >= 4:
        half = n // 2
        halves, whole = {"prefill.tp": half}, same | {"prefill.tp": n}
        found += [
            Mix(f"tp{half} + {half} stages", halves | {"decode.stages": half}),
            Mix(f"tp{half} + tp{half}", halves | {"decode.tp": half}),
            Mix(f"tp{n} & {half} stages of tp2", whole | {"decode.stages": half, "decode.tp": 2}),
            Mix("two tp1 + two tp1", {"prefill.engines": 2, "decode.engines": 2}),
        ]
    return found


def handoffs(n: int, scale: Scale) -> list[Mix]:
    """List the other ways to hand over, from one device to another, or to itself if n is 1."""
    base = {"shared_devices": n == 1}
    kept = {"kv.prefix_cache": True, "handoff.give_back": True}
    found = [
        Mix("in bulk", base | {"handoff.streaming": False}),
        Mix("checksums", base | {"handoff.checksums": True}),
        Mix("decode pages doubled", base | {"decode.page_size": 2 * scale.page_size}),
        Mix("given back, asked twice", base | kept, passes=2),
    ]
    if n >= 2:
        two = {"decode.engines": 2, "handoff.rebalance": True, "shared_devices": n == 2}
        joined = "&" if n == 2 else "+"
        found.append(Mix(f"tp1 {joined} two tp1, rebalanced", two))
    return found


def chosen(all_of_them: Sequence[Mix], wanted: Iterable[str]) -> list[Mix]:
    """Choose the mixes with one of `wanted` in the name; all, if `wanted` is empty.

    Raises:
      ValueError: no mix has such a name.
    """
    wanted = list(wanted)
    found = [mix for mix in all_of_them if not wanted or any(part in mix.name for part in wanted)]
    if not found:
        names = ", ".join(mix.name for mix in all_of_them)
        raise ValueError(f"mixes={wanted}: none of {names}")
    return found


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
    """What a plain put reaches between engines that lie on different devices."""
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
