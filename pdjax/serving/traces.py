"""Traces for an OpenTelemetry collector, over OTLP/HTTP: a span for each request, and within it one
for each phase of its sequences.

Attributes are those of OpenTelemetry's semantic conventions for HTTP servers and for generative AI;
`pdjax.` stands before others. No prompt, answer, key or user is among them.
"""

import asyncio
import os
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from itertools import islice
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pdjax.core.outputs import RequestOutput
from pdjax.host.metrics.request import RequestMetrics, phases
from pdjax.serving.logs import event
from pdjax.serving.open_answer import OpenAnswer
from pdjax.serving.trace_context import TraceContext

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
}
"""`gen_ai.operation.name` by path."""
WAITING = 2000
"""Requests that wait until they are sent; further ones are dropped."""
BATCH = 50
"""Requests that are sent together."""
PAUSE_S = 1.0
CLOSE_S = 5.0
"""Seconds that what waits has at the end of the server."""
MOST_INT = 2**63 - 1
"""The largest whole number that an attribute can be; of larger ones nothing is told."""
MOST_PHASES = 200
"""Phases of a request that are told, of all its choices together."""


def traces_url(endpoint: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Where spans are posted to; None where nobody asks for them.

    Args:
      endpoint: of a collector, as "http://host:4318"; None takes what OpenTelemetry's variables
        name.

    Raises:
      ValueError: it is no URL of HTTP, or what sends spans is not installed.
    """
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    whole = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if endpoint is None and whole:
        name, url = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", whole
    else:
        name = "OTEL_EXPORTER_OTLP_ENDPOINT" if endpoint is None else "otlp_endpoint"
        base = environment.get(name) if endpoint is None else endpoint
        if not base:
            return None
        url = f"{base.rstrip('/')}/v1/traces"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{name}={url!r}: must be a URL of HTTP, as http://host:4318")
    _exporter(url).shutdown()
    return url


def _exporter(url: str) -> Any:
    """What sends spans.

    Raises:
      ValueError: it is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ValueError(
            f"otlp_endpoint={url!r}: needs {error.name}, which is not installed; "
            "pip install 'pdjax[otel]'"
        ) from error
    return OTLPSpanExporter(endpoint=url)


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


class Traces:
    """Makes and sends the spans, on a thread of its own: the event loop never waits for it. What
    the collector does not take is dropped, and how much is logged.

    Args:
      url: that spans are posted to; see `traces_url`.
      model: its name.

    Raises:
      ValueError: what sends spans is not installed.
    """

    def __init__(self, url: str, model: str) -> None:
        self._exporter, self._spans = _exporter(url), _Spans(model)
        self._waiting: Queue[Exchange] = Queue(WAITING)
        self._dropped, self._end = 0, Event()
        self._thread = Thread(target=self._run, name="pdjax traces", daemon=True)
        self._thread.start()

    def tell(self, exchange: Exchange) -> None:
        """Take a request. It is sent once its answers are known, also those that nobody read."""
        unknown = [each.outcome for each in exchange.answers if not each.outcome.done()]
        if unknown:
            known = asyncio.gather(*unknown, return_exceptions=True)
            known.add_done_callback(lambda _: self._put(exchange))
        else:
            self._put(exchange)

    def close(self) -> None:
        """Send what waits, within `CLOSE_S`."""
        self._end.set()
        self._thread.join(CLOSE_S)
        self._exporter.shutdown()

    def _put(self, exchange: Exchange) -> None:
        try:
            self._waiting.put_nowait(exchange)
        except Full:
            self._dropped += 1

    def _run(self) -> None:
        ends = False
        while not ends:
            ends = self._end.wait(PAUSE_S)
            lost, self._dropped = self._dropped, 0
            while batch := list(self._taken()):
                made = self._spans.of(batch)
                if made and self._exporter.export(made).name != "SUCCESS":
                    lost += len(batch)
            if lost:
                event("traces_dropped", requests=lost)

    def _taken(self) -> Iterator[Exchange]:
        for _ in range(BATCH):
            try:
                yield self._waiting.get_nowait()
            except Empty:
                return


class _Ids:
    """Ids of spans: the one that the client was told, where there is one; else random ones."""

    def __init__(self, others: Any) -> None:
        self._others, self.told = others, 0
        self.generate_trace_id = others.generate_trace_id
        self.is_trace_id_random = lambda: True

    def generate_span_id(self) -> int:
        told, self.told = self.told, 0
        return told or self._others.generate_span_id()


class _Spans:
    """Makes spans of requests that have ended."""

    def __init__(self, model: str) -> None:
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        self._api, self._none, self._model = trace, Context(), model
        self._made, self._ids = InMemorySpanExporter(), _Ids(RandomIdGenerator())
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "pdjax"}
        ids: Any = self._ids
        provider = TracerProvider(
            resource=Resource.create(named), id_generator=ids, shutdown_on_exit=False
        )
        provider.add_span_processor(SimpleSpanProcessor(self._made))
        self._tracer = provider.get_tracer("pdjax")

    def of(self, exchanges: Seq[Exchange]) -> Seq[Any]:
        """The spans of these requests; none of one that its client's trace leaves out."""
        self._made.clear()
        for each in exchanges:
            self._make(each)
        return self._made.get_finished_spans()

    def _make(self, exchange: Exchange) -> None:
        api, operation = self._api, OPERATIONS.get(exchange.path)
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
            told["gen_ai.request.model"] = told["gen_ai.response.model"] = self._model
            told |= _of_answers(exchange.answers, outputs, reasons)
        name = (
            f"{operation} {self._model}" if operation else f"{exchange.method} {told['url.path']}"
        )
        span = self._tracer.start_span(
            name,
            self._within(exchange.trace),
            kind=api.SpanKind.SERVER,
            attributes={key: value for key, value in told.items() if _can_be_told(value)},
            start_time=exchange.began_ns,
        )
        if error is not None and (exchange.status or 500) not in range(400, 500):
            span.set_status(api.StatusCode.ERROR)
        if span.is_recording():
            self._make_phases(span, exchange.answers)
        span.end(exchange.ended_ns)

    def _within(self, trace: TraceContext | None) -> Any:
        """The context of a client's span, whose child is the next one; without one, a new trace."""
        if trace is None:
            return self._none
        self._ids.told = int(trace.span_id, 16)
        flags = self._api.TraceFlags(int(trace.flags, 16))
        parent = self._api.SpanContext(
            int(trace.trace_id, 16), int(trace.parent_id, 16), is_remote=True, trace_flags=flags
        )
        return self._api.set_span_in_context(self._api.NonRecordingSpan(parent), self._none)

    def _make_phases(self, span: Any, answers: Seq[OpenAnswer]) -> None:
        """A child for each phase of each sequence, and an event at each first token."""
        context = self._api.set_span_in_context(span, self._none)
        for began, phase, metrics in islice(_phases(answers), MOST_PHASES):

            def moment(seconds: float, since: float = metrics.arrival, began: int = began) -> int:
                return began + round((seconds - since) * 1e9)

            told: dict[str, Any] = {"pdjax.sequence": metrics.id}
            if phase.name == "transfer":
                moved = metrics.transfer
                told |= {"pdjax.handoff.bytes": moved.bytes, "pdjax.handoff.pages": moved.pages}
            start, end = moment(phase.start), moment(phase.end)
            child = self._tracer.start_span(phase.name, context, attributes=told, start_time=start)
            first = metrics.token_times[0] if metrics.token_times else None
            if phase.name == "prefill" and first is not None:
                child.add_event("first token", timestamp=moment(first))
            child.end(end)


def _can_be_told(value: Any) -> bool:
    return value is not None and not (isinstance(value, int) and value > MOST_INT)


def _is_known(answer: OpenAnswer) -> bool:
    outcome = answer.outcome
    return outcome.done() and not outcome.cancelled() and outcome.exception() is None


def _phases(answers: Seq[OpenAnswer]) -> Iterator[tuple[int, Any, RequestMetrics]]:
    """Each phase of each sequence, with the moment of its arrival in nanoseconds since 1970."""
    for answer in answers:
        if _is_known(answer):
            for choice in answer.outcome.result().choices:
                if isinstance(choice.metrics, RequestMetrics):
                    for phase in phases(choice.metrics):
                        yield answer.submitted_ns, phase, choice.metrics


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
