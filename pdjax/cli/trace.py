"""`pdjax trace`: serve a small workload and write what happened, as a trace and as pictures."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from pdjax.cli.command import Command
from pdjax.config import Config
from pdjax.core.request import Request, SamplingParams
from pdjax.flags import config_of, new_flags
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.summary import report
from pdjax.host.metrics.timeline import Timeline
from pdjax.host.metrics.trace import write_trace
from pdjax.pictures.figure import new_figure, save_figure
from pdjax.pictures.handoff import draw_handoff
from pdjax.pictures.timeline import draw_timeline

if TYPE_CHECKING:
    from pdjax.llm import LLM

USAGE = """
pdjax trace: serve a few requests and write a trace for ui.perfetto.dev, with pictures if asked for.

  pdjax trace --config=smollm2 --out=trace.json
  pdjax trace --prompt="Hello" --prompt="The capital of France is" --plot=timeline.png
  pdjax trace --backend=sim --requests=30 --rate=30 --prompt_tokens=600 --plot=timeline.png

Without --prompt, --requests arrive by chance at --rate a second, with prompts of between half and
one and a half times --prompt_tokens; longer ones than the config's need
--config.model.max_model_len=4096, say. --plot=timeline.png draws the run, and one hand-off in
close-up into timeline_handoff.png. --backend=sim needs no model and no device: engines, links and
pools of the config are simulated with constant costs, and KV has the shapes of Llama 3 8B unless
the config has a model.spec.
"""

_FLAGS = new_flags(config="smollm2")
_OF: dict[str, Any] = {"flag_values": _FLAGS}
_BACKEND = flags.DEFINE_enum(
    "backend", "device", ["device", "sim"], "where it is served; sim simulates", **_OF
)
_OUT = flags.DEFINE_string("out", "trace.json", "trace to write", **_OF)
_PLOT = flags.DEFINE_string("plot", None, "PNG, PDF or SVG to draw the run into", **_OF)
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "text to go on from, at once; may be repeated", **_OF
)
_REQUESTS = flags.DEFINE_integer("requests", 8, "how many, without --prompt", **_OF)
_RATE = flags.DEFINE_float("rate", 8.0, "arrivals a second, without --prompt", **_OF)
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 100, "mean, without --prompt", **_OF)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 24, "tokens of each answer", **_OF)
_SEED = flags.DEFINE_integer("seed", 0, "of arrivals and lengths", **_OF)


def trace() -> None:
    """`pdjax trace`."""
    config = config_of(_FLAGS)
    _check()
    if _BACKEND.value == "sim":
        recorder, title = _simulate(config), "simulated with constant costs"
    else:
        recorder, title = _serve(config), config.model.source
    write_trace(_OUT.value, recorder)
    print(_told(recorder))
    print(f"saved {_OUT.value}: open it at https://ui.perfetto.dev")
    if _PLOT.value is not None:
        _draw(Timeline.of(recorder), Path(_PLOT.value), title)


def _check() -> None:
    """Refuse what can't be served before a model is loaded."""
    if not _OUT.value:
        raise ValueError("out='': must name a file to write")
    for flag in (_REQUESTS, _PROMPT_TOKENS, _MAX_TOKENS):
        if flag.value is None or flag.value < 1:
            raise ValueError(f"{flag.name}={flag.value}: must be at least 1")
    if _BACKEND.value == "sim" and _PROMPT.value:
        raise ValueError("prompt: a simulation reads no text; must not be given with backend=sim")
    if _PLOT.value is not None:
        new_figure(1, 1)  # raises where it can't be drawn
        known = (".png", ".pdf", ".svg")
        if Path(_PLOT.value).suffix not in known:
            raise ValueError(f"plot={_PLOT.value!r}: must end in one of {', '.join(known)}")


def _requests(vocab_size: int, longest: int) -> list[Request]:
    """The workload, arrivals counted from 0; `longest`: tokens of prompt and answer together."""
    from pdjax.workloads.synthetic import poisson

    mean, answer = _PROMPT_TOKENS.value or 0, _MAX_TOKENS.value or 0
    if mean + mean // 2 + answer > longest:
        raise ValueError(
            f"prompt_tokens={mean}, max_tokens={answer}: one and a half prompts and an answer must "
            f"fit into model.max_model_len={longest}"
        )
    lengths = (max(1, mean // 2), mean + mean // 2), (answer, answer)
    count, rate, seed = _REQUESTS.value or 0, _RATE.value or 0.0, _SEED.value or 0
    arrivals = poisson(rate, count, *lengths, seed=seed)
    return [each.request(number, vocab_size) for number, each in enumerate(arrivals)]


# On devices.

_LONG = 10_000
"""Idle turns in a row after which a clock sleeps for as long as it ever does."""


def _serve(config: Config) -> Recorder:
    from pdjax.llm import LLM

    with LLM(config) as llm:
        if _PROMPT.value:
            params = SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS.value or 1)
            llm.generate([*_PROMPT.value], params)
        else:
            _play(llm, _requests(llm.spec.vocab_size, llm.max_model_len))
        return llm.recorder


def _play(llm: "LLM", requests: Sequence[Request]) -> None:
    """Submit each request when its moment has come, and serve them to their ends."""
    coming, names = deque(requests), list[str]()
    start = llm.clock.now()
    while coming or llm.has_work:
        now = llm.clock.now() - start
        while coming and coming[0].arrival <= now:
            request = coming.popleft()
            names.append(llm.submit(list(request.prompt_token_ids), request.params))
        if llm.has_work:
            llm.step()
        elif coming:
            llm.clock.idle(_LONG)
    for name in names:
        llm.take_output(name)


# Simulated.


def _simulate(config: Config) -> Recorder:
    from pdjax.bench.simulated import cluster_of

    cluster, longest = cluster_of(config)
    for request in _requests(cluster.vocab_size, longest):
        cluster.expect_request(request)
    cluster.run()
    return cluster.recorder


# What happened.


def _told(recorder: Recorder) -> str:
    """A line of counts, and one of how long it took."""
    whole, totals = report(recorder), recorder.transfers
    spans = recorder.spans()
    ticks = sum(span.number == 0 for span in spans)
    names = ("queue", "ttft", "row_wait", "kv_wait", "tick_wait", "itl")
    times = [
        f"{name} {value:.3g}" for name in names if (value := whole[f"median_{name}_ms"]) is not None
    ]
    return (
        f"{whole['completed']} requests in {whole['duration']:.3g} s, {len(spans) - ticks} prefill "
        f"steps, {ticks} ticks, {totals.transfers} hand-offs in {totals.shipments} shipments\n"
        f"medians in ms: {', '.join(times)}"
    )


def _draw(timeline: Timeline, path: Path, title: str) -> None:
    save_figure(draw_timeline(timeline, title), path)
    if any(flow.step is not None and flow.tick is not None for flow in timeline.flows):
        close_up = path.with_name(f"{path.stem}_handoff{path.suffix}")
        save_figure(draw_handoff(timeline), close_up)
    else:
        print("no hand-off to draw in close-up: no KV moved from prefill to decode")


COMMAND = Command(trace, _FLAGS, USAGE)
