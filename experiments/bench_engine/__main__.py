"""How much of an engine's speed is left when the coordinator serves with it?

For every given batch, prompt length and output length, with random weights and greedy requests of
random token ids:

  served   all prompts are prefilled and handed over while decode is held back; then every row
           decodes at once. Time a step is the mean gap between tokens, beside the bare engine's
           step over the same contexts in the same process, and the host's time a step in parts.
  offline  several batches of prompts, submitted at once: tokens a second.
  start    seconds to make engines and weights, and to compile; with an empty compilation cache,
           and again with the cache that the first start has filled.

  python -m experiments.bench_engine --model=llama3_8b --batch=64 --batch=256
  python -m experiments.bench_engine --model=tiny --batch=4 --prompt=24 --output=16

Any field of the config may be overridden, as in --config.decode.stages=2. Prints tables and writes
everything as JSON.
"""

import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from absl import flags

from experiments.baselines.bare import Bare
from experiments.common.config_fields import config_fields, define_config_fields
from experiments.common.llm_engines import DECODE, PREFILL, decode_held_back, engines_of
from experiments.common.origin import origin, save
from experiments.common.programs import clear_programs
from experiments.common.shapes import MODELS, SHAPES, chosen_model, random_model
from experiments.common.step_times import LABELS, StepTimes
from experiments.common.tables import number, table
from pdjax import LLM, Config, SamplingParams, load_config
from pdjax.config import DecodeConfig, KVConfig, PrefillConfig
from pdjax.flags import new_flags, run
from pdjax.host.sequences.sequence import State

FLAGS = new_flags()
_MODEL = flags.DEFINE_enum("model", None, list(MODELS), SHAPES, flag_values=FLAGS)
_BATCH = flags.DEFINE_multi_integer("batch", [64], "rows that decode", flag_values=FLAGS)
_PROMPT = flags.DEFINE_multi_integer("prompt", [1024], "tokens of a prompt", flag_values=FLAGS)
_OUTPUT = flags.DEFINE_multi_integer("output", [128], "tokens of an answer", flag_values=FLAGS)
_WAVES = flags.DEFINE_integer("waves", 2, "batches of the offline run", flag_values=FLAGS)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 3, "rounds of a number; the median counts", flag_values=FLAGS
)
_STARTS = flags.DEFINE_bool("starts", True, "time a cold and a warm start", flag_values=FLAGS)
_COLOCATED = flags.DEFINE_bool("colocated", False, "both phases on one mesh", flag_values=FLAGS)
_CACHE = flags.DEFINE_string(
    "cache", "", "compilation cache to use, which need not be empty", flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", "results/bench_engine.json", "file to write", flag_values=FLAGS)
define_config_fields(FLAGS)

PAGE_SIZE = 64
"""Tokens a page, unless a flag says otherwise; `bench_steps` has the same."""

TOKEN_BUDGET = 2048
"""Tokens of a prefill step, unless the prompts are shorter or a flag says otherwise."""


@dataclass(frozen=True)
class Point:
    """A point of the grid: `batch` rows, each with a prompt of `prompt` tokens and an answer of
    `output` tokens."""

    batch: int
    prompt: int
    output: int

    def prompts(self, vocab: int, waves: int = 1) -> list[list[int]]:
        """Draw random prompts, the same every time."""
        rng = np.random.default_rng(0)
        return rng.integers(1, vocab, (waves * self.batch, self.prompt)).tolist()

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=self.output, ignore_eos=True)


@dataclass(frozen=True)
class Served:
    """The numbers of a point of the grid; milliseconds a decode step unless said otherwise.

    Attributes:
      bare_ms: mean gap between tokens of the engine alone; the median of the rounds.
      served_ms: mean gap between tokens while every row decodes; the median of the rounds.
      median_gap_ms: median gap in the round of that median.
      host_us: the host's time by part, microseconds a step, in the same round.
      output_tokens_per_s, total_tokens_per_s: offline rates; the second also counts prompts.
    """

    bare_ms: float
    served_ms: float
    median_gap_ms: float
    host_us: dict[str, float]
    output_tokens_per_s: float
    total_tokens_per_s: float

    @property
    def ratio(self) -> float:
        return self.served_ms / self.bare_ms


def make_config(
    model: str, points: list[Point], colocated: bool, cache: str, overrides: Mapping[str, str]
) -> Config:
    """Make a config with only the buckets that these points need; all points have one batch."""
    page_size = int(overrides.get("kv.page_size", PAGE_SIZE))
    # One page more: the coordinator keeps one in reserve for each sequence that decodes.
    longest = max(point.prompt + point.output for point in points) + page_size
    shortest = min(point.prompt for point in points)
    budget = min(TOKEN_BUDGET, points[0].batch * max(point.prompt for point in points))
    sequences = max(1, min(64, budget // shortest))
    context = -(-longest // page_size)
    config = Config(
        model=random_model(model, longest),
        kv=KVConfig(page_size=page_size, prefix_cache=False),
        prefill=PrefillConfig(
            token_budget=budget,
            max_sequences=sequences,
            token_buckets=(budget,),
            page_buckets=(max(context, -(-budget // page_size) + sequences),),
        ),
        decode=DecodeConfig(
            rows=points[0].batch, row_buckets=(points[0].batch,), page_buckets=(context,)
        ),
        colocated=colocated,
        max_waiting=max(1024, points[0].batch),
        warm_up=False,  # warm-up is timed separately
        compilation_cache=cache,
    )
    return load_config(config, overrides)


def start(config: Config) -> tuple[LLM, dict[str, float]]:
    """Make an LLM and compile everything; return it and the seconds of each half."""
    gc.collect()  # frees device memory of the last LLM
    clear_programs()  # programs are traced, and looked up on disk, as in a new process
    began = time.perf_counter()
    llm = LLM(config)
    built = time.perf_counter()
    llm.coordinator.warm_up()
    return llm, {"engines_s": built - began, "warm_up_s": time.perf_counter() - built}


def measure(llm: LLM, times: StepTimes, point: Point, waves: int, rounds: int) -> Served:
    """Measure all numbers of a point. Bare and served rounds alternate, so that other work on the
    machine affects both alike."""
    prompts = point.prompts(llm.spec.vocab_size)
    check_room(llm, point)
    bare = Bare(llm, point.output - 1)
    bare_ms, served = [], []
    for _ in range(1 + rounds):
        bare_ms.append(bare.decode(prompts) * 1e3)
        served.append(served_round(llm, times, point))
    # The first round warms up.
    served_ms, median_gap_ms, host_us = sorted(served[1:], key=lambda round_: round_[0])[
        rounds // 2
    ]
    many = point.prompts(llm.spec.vocab_size, waves)
    began = time.perf_counter()
    llm.generate(many, point.params, progress=False)
    seconds = time.perf_counter() - began
    return Served(
        bare_ms=statistics.median(bare_ms[1:]),
        served_ms=served_ms,
        median_gap_ms=median_gap_ms,
        host_us=host_us,
        output_tokens_per_s=len(many) * point.output / seconds,
        total_tokens_per_s=len(many) * (point.prompt + point.output) / seconds,
    )


def served_round(llm: LLM, times: StepTimes, point: Point) -> tuple[float, float, dict[str, float]]:
    """Mean and median gap in milliseconds while every row decodes, and the host's parts."""
    ids = [llm.submit(prompt, point.params) for prompt in point.prompts(llm.spec.vocab_size)]
    rows = [llm.sequences(request_id)[0] for request_id in ids]
    with decode_held_back(llm):
        while not all(row.state is State.DECODING for row in rows):
            llm.step()
    times.seconds.clear()
    while llm.has_work:
        times.step()
    gaps = []
    for request_id in ids:
        output = llm.take_output(request_id)
        assert output is not None and len(output.token_ids) == point.output
        gaps += output.metrics.itl[1:]  # decode was held back in the first gap
    mean, median = statistics.fmean(gaps), statistics.median(gaps)
    return mean * 1e3, median * 1e3, times.per_step(point.output - 1)


def check_room(llm: LLM, point: Point) -> None:
    """Check that all rows of a point fit into the decode pool at once.

    Raises:
      ValueError: they do not; the message says what would have to fit.
    """
    [engine, *_] = engines_of(llm, DECODE)
    pages = point.batch * (1 + engine.layout.pages_for(point.prompt + point.output))
    total = engine.num_pages - 1
    if pages > total:
        raise ValueError(
            f"batch={point.batch}: with {point.prompt + point.output} tokens each needs {pages} "
            f"pages at once, but decode holds {total}; ask for fewer rows or tokens"
        )


def bench(points: list[Point], cache: str) -> dict[str, Any]:
    """Measure every point, batch by batch, since each batch has its own program."""
    overrides = config_fields(FLAGS)
    tiny = make_config("tiny", points, bool(_COLOCATED.value), cache, overrides)
    model = chosen_model(_MODEL.value, tiny)
    results: list[dict[str, Any]] = []
    starts: dict[str, dict[str, float]] = {}
    for _, group in itertools.groupby(points, key=lambda point: point.batch):
        of_batch = list(group)
        config = make_config(model, of_batch, bool(_COLOCATED.value), cache, overrides)
        if _STARTS.value and not starts:
            llm, starts["cold"] = start(config)
            del llm
            llm, starts["warm"] = start(config)
        else:
            llm, _ = start(config)
        times = StepTimes(llm)
        for point in of_batch:
            served = measure(llm, times, point, _WAVES.value or 1, _ROUNDS.value or 1)
            results.append(asdict(point) | asdict(served) | {"ratio": served.ratio})
            print(f"{point}: {served.served_ms:.2f} ms a step, {served.ratio:.3f} of bare")
        pools = {kind.value: engines_of(llm, kind)[0].num_pages for kind in (PREFILL, DECODE)}
        del llm, times  # the next one needs the devices' memory
    return {"model": model, "starts": starts, "pools": pools, "points": results}


def show(whole: dict[str, Any]) -> str:
    """Make the tables: speeds, the host's time, start-up."""
    head = ["batch x prompt + output", "bare, ms", "served, ms", "ratio", "output/s", "total/s"]
    names = [f"{p['batch']} x {p['prompt']} + {p['output']}" for p in whole["points"]]
    speeds = [
        [
            name,
            number(p["bare_ms"], 2),
            number(p["served_ms"], 2),
            number(p["ratio"], 3),
            number(p["output_tokens_per_s"], 0),
            number(p["total_tokens_per_s"], 0),
        ]
        for name, p in zip(names, whole["points"], strict=True)
    ]
    host = [[label, *(number(p["host_us"][label], 0) for p in whole["points"])] for label in LABELS]
    begun = [
        [name, number(s["engines_s"], 1), number(s["warm_up_s"], 1)]
        for name, s in whole["starts"].items()
    ]
    return "\n\n".join(
        [
            table(head, speeds),
            table(["host, us a step", *names], host),
            table(["start", "engines, s", "warm-up, s"], begun),
        ]
    )


def main() -> None:
    """Measure, print, save; see the module."""
    lengths = _BATCH.value or (), _PROMPT.value or (), _OUTPUT.value or ()
    points = [Point(*each) for each in itertools.product(*lengths)]
    for point in points:
        if min(point.batch, point.prompt) < 1 or point.output < 3:
            raise ValueError(f"{point}: batch and prompt must be at least 1, output at least 3")
    with tempfile.TemporaryDirectory() as empty:
        whole = bench(points, _CACHE.value or empty)
    whole |= origin()
    print(show(whole))
    save(whole, _OUT.value)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
