"""Priorities, deadlines, SLOs and tenants over HTTP, and what is told of a request that is shed."""

from pathlib import Path
from typing import Any

import pytest

from pdjax.core.slo import SLO
from pdjax.host.policies.orders.fair import tenant_of
from pdjax.serving.keys import ApiKey, digest_of
from tests.helpers.fake_backend import FakeBackend
from tests.helpers.http_client import Http, error_of
from tests.helpers.views import sequence

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/responses": {"input": "Hello"},
}
WISHES: dict[str, Any] = {
    "priority": -2,
    "deadline": 3.5,
    "slo": {"ttft": 0.5, "tpot": 0.05},
    "cache_salt": "of a tenant",
    "cache_pin": 60.0,
}


@pytest.mark.parametrize("path", BODIES)
def test_wishes_come_to_the_policies(tmp_path: Path, path: str):
    backend = FakeBackend(tmp_path)
    http = Http(backend)
    assert http.post(path, json={**BODIES[path], **WISHES}).status_code == 200
    asked = backend.asked
    assert (asked.priority, asked.deadline, asked.slo) == (-2, 3.5, SLO(ttft=0.5, tpot=0.05))
    assert asked.cache_salt == asked.options["cache_salt"] == "of a tenant"
    assert asked.cache_pin == asked.options["cache_pin"] == 60.0
    assert asked.options["priority"] == -2 and asked.options["slo"] == asked.slo
    nothing = dict.fromkeys(WISHES)
    assert http.post(path, json={**BODIES[path], **nothing}).status_code == 200
    asked = backend.asked
    assert (asked.priority, asked.deadline, asked.slo, asked.cache_salt) == (0, None, None, None)
    assert asked.cache_pin is None


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"priority": 1.5}, "priority"),
        ({"priority": True}, "priority"),
        ({"priority": 2**63}, "priority"),
        ({"priority": -101}, "priority"),
        ({"deadline": 0}, "deadline"),
        ({"deadline": "soon"}, "deadline"),
        ({"slo": {"ttft": -1.0}}, "slo"),
        ({"slo": {"ttft": "fast"}}, "slo.ttft"),
        ({"slo": {"latency": 1.0}}, "slo.latency"),
        ({"slo": 0.5}, "slo"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_pin": -1}, "cache_pin"),
        ({"cache_pin": 1e9}, "cache_pin"),
        ({"cache_salt": 7}, "cache_salt"),
        ({"cache_salt": "x" * 513}, "cache_salt"),
    ],
)
def test_a_wish_that_is_none_is_refused(tmp_path: Path, path: str, wish: Any, param: str):
    answer = Http(FakeBackend(tmp_path)).post(path, json={**BODIES[path], **wish})
    assert answer.status_code == 400 and error_of(answer)["param"] == param


@pytest.mark.parametrize("path", BODIES)
def test_classes_of_priority_are_bounded(tmp_path: Path, path: str):
    backend = FakeBackend(tmp_path)
    http = Http(backend)
    for priority in (-100, 100):
        assert http.post(path, json={**BODIES[path], "priority": priority}).status_code == 200
        assert backend.asked.priority == priority
    answer = http.post(path, json={**BODIES[path], "priority": -(10**9)})
    message = "priority=-1000000000: must be an integer in [-100, 100]"
    assert error_of(answer)["message"] == message


@pytest.mark.parametrize("path", BODIES)
def test_a_tenant_is_a_key_where_there_are_keys(tmp_path: Path, path: str):
    backend = FakeBackend(tmp_path)
    key = {"authorization": "Bearer secret"}
    guarded = Http(backend, api_keys=(ApiKey("a", digest_of("secret")),))
    for user in ("u1", "u2"):
        body = {**BODIES[path], "user": user}
        assert guarded.post(path, json=body, headers=key).status_code == 200
        assert tenant_of(sequence(0, 1, asked={"labels": backend.asked.labels})) == "a"
    assert Http(backend).post(path, json=body, headers=key).status_code == 200
    assert tenant_of(sequence(0, 1, asked={"labels": backend.asked.labels})) == "u2"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("cause", "status", "code", "param"),
    [
        ("overload", 503, "overloaded", None),
        ("deadline", 503, "deadline_exceeded", None),
        ("impossible", 400, "slo_impossible", "slo"),
    ],
)
def test_a_shed_request_has_a_status_and_the_reason(
    tmp_path: Path, path: str, stream: bool, cause: str, status: int, code: str, param: str | None
):
    backend = FakeBackend(tmp_path)
    http = Http(backend)
    backend.sheds = f"{cause}: slo.ttft=0.1 s, but that is too soon"
    answer = http.post(path, json={**BODIES[path], "stream": stream})
    error = error_of(answer, status)
    assert (error["code"], error["param"]) == (code, param)
    assert "slo.ttft=0.1 s, but that is too soon" in error["message"]
    assert ("retry-after" in answer.headers) == (status == 503)
    counted = http.get("/metrics").text
    assert 'finished_reason="shed"' in counted
