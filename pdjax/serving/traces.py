"""Traces for an OpenTelemetry collector, over OTLP/HTTP: a span for each request, and within it one
for each phase of its sequences.

Attributes are those of OpenTelemetry's semantic conventions for HTTP servers and for generative AI;
`pdjax.` stands before others. No prompt, answer, key or user is among them.
"""

import asyncio
import os
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

from pdjax.serving.logs import event
from pdjax.serving.request_span import Exchange, PhaseSpan, RequestSpan, request_span
from pdjax.serving.trace_context import TraceContext
from pdjax.serving.urls import url_parts

WAITING = 2000
"""Requests that wait until they are sent; further ones are dropped."""
BATCH = 50
"""Requests that are sent together."""
PAUSE_S = 1.0
CLOSE_S = 5.0
"""Seconds that what waits has at the end of the server."""


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
    parts = url_parts(url)
    if parts is None or parts.scheme not in ("http", "https"):
        raise ValueError(
            f"{name}={url!r}: must be a URL of HTTP, as http://host:4318, with a port in [1, 65536)"
        )
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
        self._exporter, self._spans = _exporter(url), _Spans()
        self._model = model
        self._waiting: Queue[RequestSpan] = Queue(WAITING)
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
            self._waiting.put_nowait(request_span(exchange, self._model))
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

    def _taken(self) -> Iterator[RequestSpan]:
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

    def __init__(self) -> None:
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        self._api, self._none = trace, Context()
        self._made, self._ids = InMemorySpanExporter(), _Ids(RandomIdGenerator())
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "pdjax"}
        ids: Any = self._ids
        provider = TracerProvider(
            resource=Resource.create(named), id_generator=ids, shutdown_on_exit=False
        )
        provider.add_span_processor(SimpleSpanProcessor(self._made))
        self._tracer = provider.get_tracer("pdjax")

    def of(self, requests: Iterable[RequestSpan]) -> Seq[Any]:
        """The spans of these requests; none of one that its client's trace leaves out."""
        self._made.clear()
        for each in requests:
            self._make(each)
        return self._made.get_finished_spans()

    def _make(self, request: RequestSpan) -> None:
        api = self._api
        span = self._tracer.start_span(
            request.name,
            self._within(request.trace),
            kind=api.SpanKind.SERVER,
            attributes=request.attributes,
            start_time=request.start_ns,
        )
        if request.failed:
            span.set_status(api.StatusCode.ERROR)
        if span.is_recording():
            self._make_phases(span, request.phases)
        span.end(request.end_ns)

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

    def _make_phases(self, span: Any, made: Iterable[PhaseSpan]) -> None:
        """A child for each phase of each sequence, and an event at each first token."""
        context = self._api.set_span_in_context(span, self._none)
        for each in made:
            child = self._tracer.start_span(
                each.name, context, attributes=each.attributes, start_time=each.start_ns
            )
            if each.first_ns is not None:
                child.add_event("first token", timestamp=each.first_ns)
            child.end(each.end_ns)
