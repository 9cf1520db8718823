"""A request as its trace tells of it: plain values without its prompts and tokens, so that many may
wait until they are sent."""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from itertools import islice
from typing import Any, NamedTuple

from pdjax.core.outputs import RequestOutput
from pdjax.host.metrics.request import RequestMetrics, phases
from pdjax.serving.open_answer import OpenAnswer
from pdjax.serving.trace_context import TraceContext

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
}
"""`gen_ai.operation.name` by path."""
MOST_INT = 2**63 - 1
"""The largest whole number that an attribute can be; of larger ones nothing is told."""
MOST_PHASES = 200
"""Phases of a request that are told, of all its choices together."""


class Exchange(NamedTuple):
    """A request, and how it was answered.

    Attributes:
      trace: of the client.
      method, path, status: of HTTP; status None where no response began.
      began_ns, ended_ns: nanoseconds since 1970.
      error: code of an error, or "client_gone"; None where all went well.
      answers: to each of its prompts.
    """

    trace: TraceContext | None
    method: str
    path: str
    status: int | None
    began_ns: int
    ended_ns: int
    error: str | None
    answers: Seq[OpenAnswer]


class PhaseSpan(NamedTuple):
    """A phase of a sequence; moments are nanoseconds since 1970.

    Attributes:
      first_ns: of the sequence's first token, where that came at the end of this phase.
    """

    name: str
    attributes: Mapping[str, Any]
    start_ns: int
    end_ns: int
    first_ns: int | None


class RequestSpan(NamedTuple):
    """A request; moments are nanoseconds since 1970.

    Attributes:
      trace: of the client.
      failed: whether the server is to blame for how it ended.
      phases: of its sequences, at most `MOST_PHASES`.
    """

    name: str
    trace: TraceContext | None
    attributes: Mapping[str, Any]
    failed: bool
    start_ns: int
    end_ns: int
    phases: Seq[PhaseSpan]


def request_span(exchange: Exchange, model: str) -> RequestSpan:
    """What is told of a request whose answers are known; `model` is the name of what was served."""
    operation = OPERATIONS.get(exchange.path)
    outputs = [answer.outcome.result() for answer in exchange.answers if _is_known(answer)]
    reasons = [str(choice.finish_reason) for output in outputs for choice in output.choices]
    error = exchange.error or ("request_failed" if "error" in reasons else None)
    told: dict[str, Any] = {
        "http.request.method": exchange.method,
        "url.path": exchange.path[:200],
        "http.response.status_code": exchange.status,
        "error.type": error,
    }
    if operation is not None:
        told |= {"gen_ai.operation.name": operation, "gen_ai.provider.name": "pdjax"}
        told["gen_ai.request.model"] = told["gen_ai.response.model"] = model
        told |= _of_answers(exchange.answers, outputs, reasons)
    return RequestSpan(
        f"{operation} {model}" if operation else f"{exchange.method} {told['url.path']}",
        exchange.trace,
        {key: value for key, value in told.items() if _can_be_told(value)},
        error is not None and (exchange.status or 500) not in range(400, 500),
        exchange.began_ns,
        exchange.ended_ns,
        tuple(islice(_phases(exchange.answers), MOST_PHASES)),
    )


def _can_be_told(value: Any) -> bool:
    return value is not None and not (isinstance(value, int) and value > MOST_INT)


def _is_known(answer: OpenAnswer) -> bool:
    outcome = answer.outcome
    return outcome.done() and not outcome.cancelled() and outcome.exception() is None


def _phases(answers: Seq[OpenAnswer]) -> Iterator[PhaseSpan]:
    """Each phase of each sequence."""
    for answer in answers:
        if _is_known(answer):
            for choice in answer.outcome.result().choices:
                if isinstance(choice.metrics, RequestMetrics):
                    yield from _phases_of(choice.metrics, answer.submitted_ns)


def _phases_of(metrics: RequestMetrics, arrival_ns: int) -> Iterator[PhaseSpan]:
    def moment(seconds: float) -> int:
        return arrival_ns + round((seconds - metrics.arrival) * 1e9)

    for phase in phases(metrics):
        told: dict[str, Any] = {"pdjax.sequence": metrics.id}
        if phase.name == "transfer":
            moved = metrics.transfer
            told |= {"pdjax.handoff.bytes": moved.bytes, "pdjax.handoff.pages": moved.pages}
        has_first = phase.name == "prefill" and len(metrics.token_times) > 0
        first = moment(metrics.token_times[0]) if has_first else None
        yield PhaseSpan(phase.name, told, moment(phase.start), moment(phase.end), first)


def _of_answers(
    answers: Seq[OpenAnswer], outputs: Seq[RequestOutput], reasons: Seq[str]
) -> dict[str, Any]:
    """What is told of a generation; None is not."""
    if not answers:
        return {}
    ask, choices = answers[0].ask, [choice for output in outputs for choice in output.choices]
    params = ask.params
    metrics = [each.metrics for each in choices if isinstance(each.metrics, RequestMetrics)]
    first = [each.ttft for each in metrics if each.ttft is not None]
    return {
        "gen_ai.request.choice.count": params.n if params.n != 1 else None,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.stream": not ask.whole,
        "gen_ai.response.finish_reasons": [*reasons] or None,
        "gen_ai.response.time_to_first_chunk": min(first, default=None),
        "gen_ai.usage.input_tokens": sum(len(each.ask.prompt_token_ids) for each in answers),
        "gen_ai.usage.output_tokens": sum(len(each.token_ids) for each in choices),
        "gen_ai.usage.cache_read.input_tokens": sum(
            output.choices[0].metrics.cached_tokens
            for output in outputs
            if isinstance(output.choices[0].metrics, RequestMetrics)
        ),
    }
