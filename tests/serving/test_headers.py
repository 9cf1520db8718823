"""What headers say: ids of requests, traces, origins of pages, API keys; over a fake backend."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdjax.serving.front import Settings
from pdjax.serving.keys import ENVIRONMENT, ApiKey, digest_of, name_of, read_keys
from pdjax.serving.logs import LOG
from tests.helpers.fake_backend import FakeBackend
from tests.helpers.http_client import Http, error_of


def test_ids_of_requests_are_honoured_where_a_header_can_hold_them(http: Http):
    assert http.get("/health", headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
    for odd in ("a b", "x" * 129, ""):
        made = http.get("/health", headers={"x-request-id": odd}).headers["x-request-id"]
        assert len(made) == 32
    answer = http.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "a-2"})
    assert answer.json()["id"] == "cmpl-a-2"


TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_trace_is_taken_into_the_log_and_returned(http: Http, caplog: Any, backend: FakeBackend):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    with caplog.at_level(logging.INFO, LOG.name):
        response = http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    line = caplog.records[-1].fields
    assert (line["trace_id"], line["parent_id"]) == (TRACE, PARENT)
    assert response.headers["traceparent"] == f"00-{TRACE}-{line['span_id']}-01"
    assert line["span_id"] != PARENT
    assert backend.answers[-1].ask.labels["trace_id"] == TRACE
    later = http.get("/health", headers={"traceparent": f"01-{TRACE}-{PARENT}-00-more"})
    assert later.headers["traceparent"].startswith(f"00-{TRACE}-")


@pytest.mark.parametrize(
    "header",
    [
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-01-more",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        "x",
        None,
    ],
)
def test_a_trace_that_is_none_is_left_out(http: Http, header: str | None, caplog: Any):
    headers = {} if header is None else {"traceparent": header}
    with caplog.at_level(logging.INFO, LOG.name):
        response = http.get("/v1/models", headers=headers)
    assert response.status_code == 200 and "traceparent" not in response.headers
    assert "trace_id" not in caplog.records[-1].fields


def test_pages_of_other_origins_read_nothing_unless_they_are_named(backend: FakeBackend):
    page = {"origin": "https://chat.example"}
    ask = {**page, "access-control-request-method": "POST"}
    ask["access-control-request-headers"] = "authorization,content-type"
    plain = Http(backend)
    assert plain.request("OPTIONS", "/v1/completions", headers=ask).status_code == 405
    assert "access-control-allow-origin" not in plain.get("/v1/models", headers=page).headers
    key = ApiKey("ann", digest_of("k1"))
    named = Http(backend, cors_origins=("https://chat.example",), api_keys=(key,))
    asked = named.request("OPTIONS", "/v1/completions", headers=ask)
    assert asked.status_code == 200
    assert "authorization" in asked.headers["access-control-allow-headers"]
    refused = named.get("/v1/models", headers=page)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://chat.example"
    other = named.get("/health", headers={"origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
    everyone = Http(backend, cors_origins=("*",)).get("/health", headers=page)
    assert everyone.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    "origin", ["example.org", "https://a/b", "https://", "https://a:70000", ""]
)
def test_an_origin_has_a_scheme_and_a_host_only(origin: str):
    with pytest.raises(ValueError, match="cors_origins: "):
        Settings(cors_origins=(origin,))


def test_keys_open_all_but_the_probes(backend: FakeBackend, caplog: Any):
    http = Http(backend, api_keys=(ApiKey("ann", digest_of("k1")), ApiKey("bob", digest_of("k2"))))
    for path in ("/v1/models", "/metrics", "/engines", "/openapi.json"):
        for headers in ({}, {"authorization": "Bearer k3"}, {"authorization": "Basic k1"}):
            assert error_of(http.get(path, headers=headers), 401)["code"] == "invalid_api_key"
    assert http.get("/health").status_code == http.get("/ready").status_code == 200
    with caplog.at_level(logging.INFO, LOG.name):
        assert http.get("/v1/models", headers={"authorization": "Bearer k2"}).status_code == 200
    assert caplog.records[-1].fields["key"] == "bob"
    assert "k2" not in caplog.text


def test_keys_are_read_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert read_keys(None) == ()
    file = tmp_path / "keys"
    file.write_text("# team\nann: a:b\n\nbob:k2\n")
    assert name_of(read_keys(str(file)), "Bearer a:b") == "ann"
    monkeypatch.setenv(ENVIRONMENT, "eve:k")
    assert [key.name for key in read_keys(None)] == ["eve"]
    for text, message in (
        ("ann", "name:key"),
        ("a:1\na:2", "comes twice"),
        ("#", "must hold"),
        ("a:k\nb:schlüssel", "entry 2: the key of 'b' must be of printable ASCII"),
    ):
        file.write_text(text, "utf-8")
        with pytest.raises(ValueError, match=message):
            read_keys(str(file))


@pytest.fixture(autouse=True)
def restored_loggers() -> Iterator[None]:
    """The command line's tests may have replaced the handlers."""
    logger = logging.getLogger("pdjax")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before
