"""The server without a client of its own kind: bad bodies, refused fields, keys, ids, probes,
metrics, the drain. All over a fake backend."""

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from pdjax.serving import state
from pdjax.serving.logs import LOG, JsonLines
from pdjax.serving.requests import REFUSED
from tests.helpers.fake_backend import PATIENCE, FakeBackend
from tests.helpers.http_client import Http, error_of

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(http: Http, name: str):
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", CHAT)):
        error = error_of(http.post(path, json={**body, name: "something"}))
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        for nothing in (None, *REFUSED[name]):
            assert http.post(path, json={**body, name: nothing}).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", False),
        ("echo", 0),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("n", 0),
        ("stop", [1]),
        ("stop", ""),
        ("stop_token_ids", [True]),
        ("prompt", []),
        ("prompt", ""),
        ("prompt", [[]]),
        ("prompt", ["x"] * 65),
        ("prompt", [1, "x"]),
        ("prompt", ["x", [1]]),
        ("prompt", [True]),
        ("prompt", {"text": "x"}),
        ("prompt", "\ud800"),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", True),
        ("stream_options", {"include_usage": True}),
        ("stream_options", {"include_usage": 1}),
        ("best_of", 3),
    ],
)
def test_a_wrong_value_is_refused_by_its_field(http: Http, field: str, value: Any):
    body = json.dumps({"prompt": "x", field: value})
    headers = {"content-type": "application/json"}
    error = error_of(http.post("/v1/completions", content=body, headers=headers))
    assert error["param"].split(".")[0] == field, error
    assert not http.front.answers


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("messages[0].role", {"content": "x"}),
        ("messages[0].content", {"role": "user", "content": 5}),
        ("messages[0].content[0]", {"role": "user", "content": [{"type": "text"}]}),
        ("messages[0].content[0].type", {"role": "user", "content": [{"type": "image_url"}]}),
        ("messages[0].tool_calls", {"role": "assistant", "tool_calls": "x"}),
        (
            "messages[0].tool_calls[0].function.arguments",
            {"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]},
        ),
        ("messages", None),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(http: Http, where: str, message: Any):
    messages = [] if message is None else [message]
    assert (
        error_of(http.post("/v1/chat/completions", json={"messages": messages}))["param"] == where
    )


def test_a_bound_beyond_the_context_is_the_contexts(http: Http):
    body = json.dumps({"prompt": "x", "max_tokens": 10**400})
    headers = {"content-type": "application/json"}
    assert http.post("/v1/completions", content=body, headers=headers).status_code == 200
    line = 'pdjax:request_params_max_tokens_sum{model_name="fake"} 4096.0'
    assert line in http.get("/metrics").text


def test_options_that_need_others_are_refused(http: Http):
    top = http.post("/v1/chat/completions", json={**CHAT, "top_logprobs": 2})
    assert error_of(top)["param"] == "top_logprobs"


def test_a_field_that_nobody_knows_is_ignored_and_logged(http: Http, caplog: Any):
    with caplog.at_level(logging.INFO, LOG.name):
        http.post("/v1/completions", json={"prompt": "x", "no_such_field": 1, "store": True})
    [line] = [record.fields for record in caplog.records if record.message == "request"]
    assert line["ignored_fields"] == ["no_such_field"]
    assert (line["status"], line["prompt_tokens"], line["completion_tokens"]) == (200, 1, 16)
    assert line["finish_reason"] == "length" and line["ttft_ms"] >= 0


@pytest.mark.parametrize(
    "body", [b"{", b"\xff\xfe\x00", b'{"prompt": "\xff"}', b"[" * 100_000, b"", b"5", b'"x"']
)
def test_a_body_that_is_no_request_is_a_400(http: Http, body: bytes):
    headers = {"content-type": "application/json"}
    error_of(http.post("/v1/completions", content=body, headers=headers))


def test_a_body_has_a_bound(backend: FakeBackend):
    http = Http(backend, max_body=100)

    async def endless() -> Any:
        for _ in range(50):
            yield b" " * 10

    for content in (b" " * 101, endless()):
        error = error_of(http.post("/v1/completions", content=content), 413)
        assert error["code"] == "request_too_large"


def test_a_body_that_never_ends_is_given_up(backend: FakeBackend):
    async def stuck() -> Any:
        yield b"{"
        await asyncio.sleep(20)

    error_of(Http(backend, body_s=0.05).post("/v1/completions", content=stuck()), 408)


def test_paths_and_methods_that_are_not_there(http: Http):
    error_of(http.get("/v1/nothing"), 404)
    error_of(http.get("/v1/completions"), 405)
    error_of(http.get("/v1/models/other"), 404)


def test_an_error_within_the_server_says_nothing_of_it(
    http: Http, monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    async def report() -> Any:
        raise OSError("/root/secret")

    monkeypatch.setattr(http.front.backend, "report", report)
    error = error_of(http.get("/metrics", headers={"x-request-id": "abc"}), 500)
    assert "secret" not in error["message"] and "abc" in error["message"]
    assert "/root/secret" in caplog.text


def test_texts_and_conversations_are_tokenized_and_back(http: Http, backend: FakeBackend):
    made = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert made["tokens"] == backend.bytes.encode("hé")
    assert (made["count"], made["max_model_len"], made["token_strs"][0]) == (3, 4096, "h")
    assert http.get("/tokenizer_info").json()["vocab_size"] == backend.bytes.vocab_size
    back = http.post("/detokenize", json={"tokens": made["tokens"]})
    assert back.json() == {"prompt": "hé"}
    chat = http.post("/tokenize", json=CHAT).json()
    assert chat["tokens"] == backend.bytes.encode("<user>hello<assistant>")
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {**CHAT, "prompt": "x"}),
        ("/detokenize", {"tokens": [300]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "x"}),
    ):
        error_of(http.post(path, json=body))


def test_metrics_have_the_families_of_vllm(http: Http):
    http.post("/v1/completions", json={"prompt": "xyz", "max_tokens": 4})
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    for line in (
        'pdjax:prompt_tokens_total{model_name="fake"} 3.0',
        'pdjax:generation_tokens_total{model_name="fake"} 4.0',
        'pdjax:request_success_total{finished_reason="length",model_name="fake"} 1.0',
        'pdjax:prefix_cache_hits_total{model_name="fake"} 2.0',
        'pdjax:num_requests_waiting{model_name="fake"} 2.0',
        'pdjax:kv_cache_usage_perc{model_name="fake",pool="hbm/decode/0"} 0.25',
        'pdjax:time_to_first_token_seconds_count{model_name="fake"} 1.0',
        'pdjax:inter_token_latency_seconds_count{model_name="fake"} 3.0',
        'pdjax:e2e_request_latency_seconds_bucket{le="7680.0",model_name="fake"} 1.0',
        'pdjax:link_wire_seconds_total{link="hbm/0->hbm/1",model_name="fake"} 0.25',
        'pdjax:http_responses_total{model_name="fake",path="/v1/completions",status="200"} 1.0',
    ):
        assert line in lines, line
    assert "_created" not in response.text
    assert http.request("HEAD", "/metrics").status_code == 200


def test_engines_tell_their_state(http: Http):
    engines = http.get("/engines").json()
    assert engines["queue"] == {"waiting": 2, "running": 1, "max_waiting": 9}
    assert engines["engines"]["decode/0"]["free_rows"] == 3 and engines["open_answers"] == 0


def test_a_server_that_drains_refuses_and_says_so(http: Http):
    http.front.is_draining = True
    assert error_of(http.get("/ready"), 503)["code"] == "shutting_down"
    assert http.get("/health").status_code == 200
    refused = http.post("/v1/completions", json={"prompt": "x"})
    assert error_of(refused, 503)["code"] == "shutting_down"
    assert refused.headers["retry-after"] == "1"


def test_engines_that_do_not_answer_take_no_requests(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
):
    async def never() -> dict[str, Any]:
        await asyncio.sleep(PATIENCE)
        raise AssertionError("the test is over")

    monkeypatch.setattr(state, "ANSWER_S", 0.01)
    monkeypatch.setattr(backend, "report", never)
    http = Http(backend)
    assert error_of(http.get("/ready"), 503)["code"] == "engines_hang"
    assert http.get("/health").status_code == 200  # of the process that answers


def test_the_schema_names_every_endpoint(http: Http):
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/metrics"} <= set(paths)
    assert http.get("/docs").status_code == 404


def test_log_lines_are_json():
    record = LOG.makeRecord(
        LOG.name, logging.INFO, "", 0, "x", (), None, extra={"fields": {"a": 1}}
    )
    line = json.loads(JsonLines().format(record))
    assert (line["event"], line["level"], line["a"]) == ("x", "info", 1)


@pytest.fixture(autouse=True)
def restored_loggers() -> Iterator[None]:
    """The command line's tests may have replaced the handlers."""
    logger = logging.getLogger("pdjax")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before
