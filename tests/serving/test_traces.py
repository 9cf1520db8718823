"""Traces: where they are sent to; and what a collector is told of requests to a fake backend."""

import asyncio
import logging
import pickle
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import pytest

from pdjax.core.guide import Guide
from pdjax.core.outputs import Completion, RequestOutput
from pdjax.core.request import SamplingParams
from pdjax.serving import traces
from pdjax.serving.backend import Ask
from pdjax.serving.front import Front, Settings
from pdjax.serving.logs import LOG
from pdjax.serving.request_span import Exchange, request_span
from pdjax.serving.traces import traces_url
from tests.helpers.fake_backend import PATIENCE, FakeBackend, served

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BODY = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 5, "user": "somebody"}


class Collector:
    """Takes spans over HTTP.

    Attributes:
      url: that they are posted to.
      bodies: that came.
      status: of its responses.
    """

    def __init__(self) -> None:
        self.bodies, self.status, collector = list[bytes](), 200, self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.bodies.append(body)
                self.send_response(collector.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def spans(self) -> list[Any]:
        """All that came, in order."""
        sent = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
        found = []
        for body in self.bodies:
            for resource in sent.ExportTraceServiceRequest.FromString(body).resource_spans:
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return found


@contextmanager
def collecting() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector.server.shutdown()
        collector.server.server_close()
        thread.join()


def values(span: Any) -> dict[str, Any]:
    """The attributes of a span."""

    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        given = getattr(value, kind)
        return [plain(each) for each in given.values] if kind == "array_value" else given

    return {each.key: plain(each.value) for each in span.attributes}


@pytest.mark.parametrize(
    ("flag", "environment", "url"),
    [
        (None, {}, None),
        ("", {}, None),
        ("http://here:1/", {}, "http://here:1/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://a/b"}, "https://a/b/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a/b"}, "http://a/b"),
        ("http://here:1", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}, "http://here:1/v1/traces"),
        ("http://here:1", {"OTEL_SDK_DISABLED": "true"}, None),
    ],
)
def test_the_flag_goes_before_the_variables(
    flag: str | None, environment: dict[str, str], url: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(traces, "_exporter", lambda _: SimpleNamespace(shutdown=lambda: None))
    assert traces_url(flag, environment) == url


BAD_PORTS = ["http://here:0", "http://here:70000", "https://here:no", "http://[::1"]


@pytest.mark.parametrize("endpoint", ["here:4318", "ftp://here", "http://", "4318", *BAD_PORTS])
def test_what_is_no_url_of_http_is_refused(endpoint: str):
    with pytest.raises(ValueError, match=r"otlp_endpoint=.*must be a URL of HTTP"):
        traces_url(endpoint, {})


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ValueError, match=r"needs .*, which is not installed.*pdjax\[otel\]"):
        traces_url("http://here:4318", {})


def test_a_request_is_a_span_of_its_clients_trace(tmp_path: Path):
    with collecting() as collector:
        settings = Settings(traces_url=collector.url)
        with (
            served(lambda: FakeBackend(tmp_path), settings) as at,
            httpx2.Client(base_url=at.url) as client,
        ):
            header = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            told = client.post("/v1/chat/completions", json=BODY, headers=header)
            left_out = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
            client.post("/v1/chat/completions", json=BODY, headers=left_out)
            assert client.post("/v1/completions", json={"prompt": ""}).status_code == 400
            client.get("/health")
    [phase, span, refused] = collector.spans()
    assert span.name == "chat fake" and span.kind == span.SPAN_KIND_SERVER
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.span_id.hex() == told.headers["traceparent"].split("-")[2]
    assert values(span) == {
        "http.request.method": "POST",
        "url.path": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "pdjax",
        "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.stream": False,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.response.time_to_first_chunk": pytest.approx(0, abs=5),
        "gen_ai.usage.input_tokens": len("<user>a secret<assistant>"),
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 2,
    }
    assert phase.name == "prefill" and phase.events[0].name == "first token"
    assert phase.parent_span_id == span.span_id and phase.trace_id == span.trace_id
    assert abs(phase.start_time_unix_nano - span.start_time_unix_nano) < 5e9
    assert refused.name == "text_completion fake" and not refused.parent_span_id
    assert values(refused)["error.type"] == "invalid_value" and refused.status.code == 0
    sent = b"".join(collector.bodies)
    assert b"secret" not in sent and b"somebody" not in sent


def test_a_client_that_leaves_is_told_with_what_had_been_generated(tmp_path: Path):
    def slow() -> FakeBackend:
        backend = FakeBackend(tmp_path)
        backend.token_s = 0.02
        return backend

    with collecting() as collector:
        with (
            served(slow, Settings(traces_url=collector.url)) as at,
            httpx2.Client(base_url=at.url) as client,
        ):
            with client.stream(
                "POST", "/v1/completions", json={"prompt": "x", "stream": True}
            ) as one:
                next(one.iter_raw())
            at.until(lambda: not at.front.requests)
        [_, span] = collector.spans()
    told = values(span)
    assert told["gen_ai.response.finish_reasons"] == ["abort"]
    assert told["error.type"] == "client_gone" and 0 < told["gen_ai.usage.output_tokens"] < 16


def test_what_the_collector_does_not_take_is_dropped_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(traces, "WAITING", 3)
    with collecting() as collector, caplog.at_level(logging.INFO, LOG.name):
        collector.status = 400
        with (
            served(lambda: FakeBackend(tmp_path), Settings(traces_url=collector.url)) as at,
            httpx2.Client(base_url=at.url) as client,
        ):
            for _ in range(8):
                assert client.get("/v1/models").status_code == 200
    dropped = [vars(each)["fields"] for each in caplog.records if each.msg == "traces_dropped"]
    assert sum(fields["requests"] for fields in dropped) == 8
    assert len(collector.spans()) >= 3


def test_spans_are_sent_off_while_the_event_loop_goes_on(tmp_path: Path):
    async def close() -> None:
        front, sent = Front(FakeBackend(tmp_path), Settings()), threading.Event()
        front.traces = cast(Any, SimpleNamespace(close=lambda: sent.wait(PATIENCE)))
        closing = asyncio.ensure_future(front.close())
        await asyncio.sleep(0.01)
        assert not closing.done()
        sent.set()
        await closing

    asyncio.run(close())


def test_what_waits_holds_no_prompt_and_no_token():
    ids = list(range(100_000))
    answer: Any = SimpleNamespace(
        ask=Ask(tuple(ids), SamplingParams(guide=Guide.regex("a" * 100_000))),
        outcome=Future[RequestOutput](),
        submitted_ns=0,
    )
    whole = Completion(ids, "x" * 100_000, "length", None, None, None, None)
    output = RequestOutput("", None, ids, [whole])
    answer.outcome.set_result(output)
    exchange = Exchange(None, "POST", "/v1/completions", 200, 0, 1, None, [answer])
    waits = request_span(exchange, "m")
    assert waits.attributes["gen_ai.usage.output_tokens"] == 100_000
    assert len(pickle.dumps(waits)) < 2000
