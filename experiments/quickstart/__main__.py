"""Does it work, end to end, on a real model?

Eight chats arrive over a few seconds. Each is prefilled on one mesh, its KV pages move to another
mesh, and its answer is decoded there; one answer streams to the terminal. Then the same requests
run on one device, and every token is compared.

  python -m experiments.quickstart --config=configs/smollm2_cpu.py

Writes metrics.json and trace.json, which opens in Perfetto (https://ui.perfetto.dev). Exit status 1
where a token differs, a request fails or a put changed a layout.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments.common.tables import megabytes, number, percent, table
from pdjax import Config, RequestOutput, SamplingParams
from pdjax.core.progress import Progress
from pdjax.flags import config_of, new_flags, run
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.request import in_ms

if TYPE_CHECKING:
    from pdjax import LLM

FLAGS = new_flags(config="configs/smollm2_cpu.py")
_OUT = flags.DEFINE_string("out", "results/quickstart", "directory to write", flag_values=FLAGS)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "most tokens an answer", flag_values=FLAGS)

PASSAGE = (
    "Serving a language model has two phases. Prefill reads the whole prompt at once and is "
    "limited by arithmetic; decode produces one token after another and is limited by memory "
    "bandwidth. When both share a device, a long prompt makes every running answer stutter, "
    "because its prefill has to be squeezed in between decode steps. Disaggregation gives each "
    "phase devices of its own, in the number and the parallel layout that suit it. The price is "
    "that the keys and values computed by prefill must travel to the devices that decode. So the "
    "questions are how fast they travel, whether the journey can overlap with computing, and who "
    "decides when a request moves."
)


@dataclass(frozen=True)
class Question:
    """A chat message and its arrival in seconds."""

    at: float
    text: str
    sampled: bool = False
    shown: bool = False


QUESTIONS = (
    Question(0.0, "What is the capital of France?"),
    Question(0.2, "What does a lighthouse do?", shown=True),
    Question(0.6, "Name three primary colors."),
    Question(1.0, f"Summarize this in one sentence: {PASSAGE}"),
    Question(1.5, "Write a haiku about the sea.", sampled=True),
    Question(2.0, "Describe a sunset in one sentence."),
    Question(3.0, "Suggest a name for a friendly robot.", sampled=True),
    Question(4.0, "Why is the sky blue?"),
)


def params_of(question: Question, number: int, max_tokens: int) -> SamplingParams:
    """Make params: greedy, or sampled with a seed, so that the tokens are determined."""
    if question.sampled:
        return SamplingParams(temperature=0.8, top_p=0.95, seed=number, max_tokens=max_tokens)
    return SamplingParams(temperature=0.0, max_tokens=max_tokens)


def serve(
    llm: "LLM",
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    questions: Sequence[Question],
    show: Callable[[str], None],
) -> list[RequestOutput]:
    """Submit each prompt when its question arrives, and step until all are answered."""
    start = llm.clock.now()
    ids: list[str] = []
    while len(ids) < len(questions) or llm.has_work:
        while len(ids) < len(questions) and llm.clock.now() - start >= questions[len(ids)].at:
            number = len(ids)
            shown = questions[number].shown
            ids.append(llm.submit(prompts[number], params[number], on_text=show if shown else None))
        llm.step()  # sleeps where there is nothing to do
    outputs = [output for output in map(llm.take_output, ids) if output is not None]
    assert len(outputs) == len(ids), "a request has ended without an output"
    return outputs


def monolithic(config: Config) -> Config:
    """Make the config of the same run on one device, which does both phases."""
    return dataclasses.replace(
        config,
        colocated=True,
        handoff=config.handoff.where_nothing_moves,
        prefill=dataclasses.replace(config.prefill, engines=1, tp=1),
        decode=dataclasses.replace(config.decode, engines=1, stages=1, tp=1),
    )


def request_table(questions: Sequence[Question], outputs: Sequence[RequestOutput]) -> str:
    """Make a table with a row a question: latencies, and the bytes of the hand-off."""
    rows = []
    for question, output in zip(questions, outputs, strict=True):
        metrics = output.metrics
        rows.append(
            [
                question.text if len(question.text) <= 40 else f"{question.text[:37]}...",
                str(metrics.prompt_tokens),
                str(metrics.output_tokens),
                number(in_ms(metrics.ttft), 0),
                number(in_ms(metrics.tpot), 0),
                str(metrics.transfer.pages),
                megabytes(metrics.transfer.bytes),
                output.finish_reason or "-",
            ]
        )
    headers = [
        "question",
        "prompt",
        "output",
        "TTFT ms",
        "TPOT ms",
        "pages moved",
        "MB moved",
        "end",
    ]
    return table(headers, rows)


def engine_table(recorder: Recorder) -> str:
    """Make a table with a row an engine: steps, share of busy time, active rows, idle stages."""
    rows = [
        [
            track,
            str(work.steps),
            number(work.busy_seconds),
            percent(work.occupancy),
            percent(work.bubble_share),
        ]
        for track, work in sorted(recorder.engines.items())
    ]
    return table(["engine", "steps", "busy s", "occupancy", "bubble share"], rows)


def save(path: Path, llm: "LLM", extra: dict[str, Any]) -> None:
    """Write metrics.json and trace.json of the run."""
    whole = {**llm.report(), **extra, "config": dataclasses.asdict(llm.config)}
    from experiments.common.origin import write_json  # starts JAX

    write_json(whole, path / "metrics.json")
    llm.write_trace(path / "trace.json")


def main() -> int:
    """Run the demo; see the module."""
    config = config_of(FLAGS)
    params = [params_of(q, i, _MAX_TOKENS.value or 1) for i, q in enumerate(QUESTIONS)]

    print(f"Prefill: tp {config.prefill.tp}. Decode: {config.decode.stages} stages.")
    with Progress().phase("importing JAX"):
        from pdjax import LLM

    print("Loading the model and compiling ...", flush=True)
    with LLM(config) as llm:
        if llm.tokenizer is None:
            raise ValueError(f"model.source={config.model.source!r}: has no tokenizer to chat with")
        prompts = [
            llm.tokenizer.apply_chat_template([{"role": "user", "content": q.text}])
            for q in QUESTIONS
        ]
        llm.recorder.clear()
        asked = next(q.text for q in QUESTIONS if q.shown)
        print(f"\n{len(QUESTIONS)} chats arrive; this one is shown as it comes.\n\n> {asked}")
        outputs = serve(
            llm, prompts, params, QUESTIONS, lambda text: print(text, end="", flush=True)
        )
        print("\n\nThe others:\n")
        for question, output in zip(QUESTIONS, outputs, strict=True):
            if not question.shown:
                failed = output.choices[0].error
                answer = f"FAILED: {failed}" if failed else output.text.strip()
                print(f"> {question.text[:90]}\n{answer}\n")

    print("The same requests on one device; loading and compiling again ...", flush=True)
    with LLM(monolithic(config)) as one_device:
        alone = one_device.generate([*prompts], params, progress=False)

    exact = sum(
        ours.token_ids == theirs.token_ids and ours.finish_reason != "error"
        for ours, theirs in zip(outputs, alone, strict=True)
    )
    puts = llm.recorder.transfers.layout_changing_puts
    verdict = f"{exact} of {len(outputs)} token-exact"
    answers = [
        {"question": q.text, "answer": o.text} for q, o in zip(QUESTIONS, outputs, strict=True)
    ]
    save(Path(_OUT.value or "."), llm, {"token_exact": verdict, "answers": answers})

    print(f"\n{request_table(QUESTIONS, outputs)}\n\n{engine_table(llm.recorder)}\n")
    print("Virtual devices share the machine's cores: these times show no more than that it works.")
    print(f"layout-changing puts: {puts}")
    print(f"disaggregated = monolithic: {verdict}")
    print(f"saved {_OUT.value}/metrics.json and {_OUT.value}/trace.json (ui.perfetto.dev)")
    return int(exact < len(outputs) or puts > 0)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
