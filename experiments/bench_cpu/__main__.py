"""How fast is one CPU device, compared with transformers on the same file?

Prefill is in tokens a second; decode in milliseconds a step, float32, at several batch sizes.
Decode is measured bare (the engine's step alone) and served (the median gap between the tokens of
requests that go through the coordinator). Where torch and transformers are installed they are
measured right after, in the same process, on the same file, prompts and cores. "same tokens" counts
the rows that have the same greedy continuation in both.

  python -m experiments.bench_cpu

Prints a table and writes it as JSON.
"""

import dataclasses
import statistics

from absl import flags

from experiments.baselines import transformers
from experiments.baselines.bare import Bare
from experiments.common.origin import origin, save
from experiments.common.tables import number, table
from experiments.common.workload import TEXT, Numbers, Workload
from pdjax import LLM, Config, SamplingParams
from pdjax.config import DecodeConfig, KVConfig, ModelConfig, PrefillConfig
from pdjax.flags import new_flags, run

MODEL = "smollm2-135m-instruct"
PAGE_SIZE = 64
"""Tokens a page: one longer run of memory is read faster than several short ones."""

FLAGS = new_flags()
_BATCH = flags.DEFINE_multi_integer("batch", [1, 8], "rows that decode", flag_values=FLAGS)
_CONTEXT = flags.DEFINE_integer("context", 128, "tokens of a prompt", flag_values=FLAGS)
_STEPS = flags.DEFINE_integer("steps", 32, "decode steps a round", flag_values=FLAGS)
_PREFILL = flags.DEFINE_integer("prefill", 512, "tokens of a prefill", flag_values=FLAGS)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "rounds a number", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "results/bench_cpu.json", "file to write", flag_values=FLAGS)


def one_device(rows: int, work: Workload) -> Config:
    """Make a colocated config for one device, with only the buckets that the workload needs."""
    kv_pages = -(-work.longest // PAGE_SIZE)
    decoded = -(-(work.context + work.steps + 1) // PAGE_SIZE)
    return Config(
        model=ModelConfig(source=MODEL, max_model_len=work.longest),
        kv=KVConfig(page_size=PAGE_SIZE, prefix_cache=False),
        prefill=PrefillConfig(
            token_budget=work.prefill,
            token_buckets=(work.prefill,),
            page_buckets=(kv_pages + PrefillConfig().max_sequences,),
        ),
        decode=DecodeConfig(rows=rows, page_buckets=tuple(sorted({decoded, kv_pages}))),
        colocated=True,
        cpu_devices=1,
    )


def bench_pdjax(work: Workload) -> tuple[Numbers, list[int]]:
    """Measure this project; return its numbers and the token ids from which prompts are cut."""
    numbers, token_ids = Numbers(), []
    for rows in work.batches:
        with LLM(one_device(rows, work)) as llm:
            assert llm.tokenizer is not None
            token_ids = llm.tokenizer.encode(TEXT * (2 + work.longest // 40 + rows // 8))
            if rows == work.batches[0]:
                measure_prefill(llm, token_ids, work, numbers)
            prompts = work.prompts(token_ids, rows)
            measure_bare_decode(llm, prompts, work, numbers)
            measure_served(llm, prompts, work, numbers)
    return numbers, token_ids


def measure_prefill(llm: LLM, token_ids: list[int], work: Workload, numbers: Numbers) -> None:
    """Measure the prefill of one prompt in one step."""
    bare, prompt = Bare(llm, work.steps), token_ids[: work.prefill]
    seconds = work.median_seconds(lambda: bare.prefill(prompt))
    numbers.prefill_tokens_per_s = work.prefill / seconds


def measure_bare_decode(
    llm: LLM, prompts: list[list[int]], work: Workload, numbers: Numbers
) -> None:
    """Measure the time of a round, divided by its steps."""
    bare = Bare(llm, work.steps)
    seconds = work.median_seconds(lambda: bare.decode(prompts))
    numbers.bare_ms[len(prompts)] = seconds / work.steps * 1e3


def measure_served(llm: LLM, prompts: list[list[int]], work: Workload, numbers: Numbers) -> None:
    """Measure the same prompts as requests, all at once."""
    params = SamplingParams(temperature=0.0, max_tokens=work.steps + 1, ignore_eos=True)
    gaps: list[float] = []
    for _ in range(work.rounds):
        outputs = llm.generate([*prompts], params, progress=False)
        gaps += [gap for output in outputs for gap in output.metrics.itl]
    numbers.served_ms[len(prompts)] = statistics.median(gaps) * 1e3
    numbers.token_ids[len(prompts)] = [output.token_ids for output in outputs]


def rows_alike(ours: Numbers, theirs: Numbers, batch: int) -> int:
    """Count the rows with the same greedy continuation."""
    pairs = zip(ours.token_ids[batch], theirs.token_ids[batch], strict=True)
    return sum(a == b for a, b in pairs)


def show(work: Workload, systems: dict[str, Numbers]) -> str:
    """Make the table: a column a system, and the number of equal continuations."""
    columns = list(systems.values())
    rows = [[f"prefill of {work.prefill} tokens, tokens/s"]]
    rows[0] += [number(column.prefill_tokens_per_s, 0) for column in columns]
    for batch in work.batches:
        label = f"decode, batch {batch}"
        bare = [number(column.bare_ms[batch]) for column in columns]
        served = [number(column.served_ms.get(batch)) for column in columns]
        rows += [[f"{label}, bare, ms/step", *bare], [f"{label}, served, ms/step", *served]]
        if len(columns) == 2:
            alike = f"{rows_alike(columns[0], columns[1], batch)} of {batch}"
            rows.append([f"{label}, rows with the same tokens", "", alike])
    return table(["", *systems], rows)


def main() -> None:
    """Measure, print, save; see the module."""
    work = Workload(
        tuple(_BATCH.value or ()),
        _CONTEXT.value or 0,
        _STEPS.value or 0,
        _PREFILL.value or 0,
        _ROUNDS.value or 0,
    )
    print(f"{MODEL}, float32", flush=True)
    ours, token_ids = bench_pdjax(work)
    systems = {"pdjax": ours}
    if transformers.installed():
        systems["transformers"] = transformers.bench(MODEL, token_ids, work)
    else:
        print("torch and transformers are not installed, so there is nothing to compare with")
    print(show(work, systems))
    whole = {
        "model": MODEL,
        "workload": dataclasses.asdict(work),
        "systems": {name: dataclasses.asdict(numbers) for name, numbers in systems.items()},
    }
    save(whole | origin("torch", "transformers"), _OUT.value)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
