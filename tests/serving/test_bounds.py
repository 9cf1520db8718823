"""What one client may not do to others: hold the event loop, or keep short texts waiting; and what
is counted of one that leaves."""

import asyncio
import json
import re
import threading
from pathlib import Path

import httpx2
import pytest

from pdjax.serving import chats, generation, middleware
from pdjax.serving.front import Front, Settings
from pdjax.serving.text_threads import BRIEF, LONG, TextThreads
from tests.helpers.fake_backend import PATIENCE, FakeBackend, served
from tests.helpers.http_client import Http, error_of


def test_too_many_prompts_are_refused_before_each_is_looked_at(backend: FakeBackend):
    error = error_of(Http(backend).post("/v1/completions", json={"prompt": [["x"], 5] * 40}))
    assert "80 prompts" in error["message"]


def test_a_prompt_beyond_the_context_is_not_passed_on(backend: FakeBackend):
    error = error_of(Http(backend).post("/v1/completions", json={"prompt": [1] * 4096}))
    assert error["code"] == "context_length_exceeded" and not backend.answers


def test_a_body_has_a_bound_of_arrays_and_objects(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(middleware, "MAX_BRACKETS", 9)
    http, headers = Http(backend), {"content-type": "application/json"}
    for prompts, status in ((7, 200), (8, 413)):
        body = json.dumps({"prompt": [[1]] * prompts, "max_tokens": 1})
        response = http.post("/v1/completions", content=body, headers=headers)
        assert response.status_code == status
    assert error_of(response, 413)["code"] == "request_too_large"


def test_a_short_text_does_not_wait_for_a_long_one(backend: FakeBackend):
    async def both() -> int:
        front, end = Front(backend, Settings()), threading.Event()
        try:
            waiting = asyncio.ensure_future(
                front.in_thread(lambda _: end.wait(PATIENCE), "x" * LONG)
            )
            length = await asyncio.wait_for(front.in_thread(len, "short" * BRIEF), PATIENCE)
            nested = front.in_thread(len, [{"content": ["y" * LONG]}])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(nested, 0.05)
            assert not waiting.done()
        finally:
            end.set()
        await waiting
        return length

    assert asyncio.run(both()) == 5 * BRIEF


def test_token_ids_wait_for_no_thread_of_texts(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(TextThreads, "call", None)
    for prompt in ([1] * 2 * BRIEF, [[1], [2, 3]]):
        body = {"prompt": prompt, "max_tokens": 1}
        assert Http(backend).post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(("short", "name"), [(8, "MainThread"), (7, "pdjax long texts_0")])
def test_many_log_probabilities_are_written_beside_the_event_loop(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, short: int, name: str
):
    written = []

    def chat_logprobs(*_: object) -> None:
        written.append(threading.current_thread().name)

    monkeypatch.setattr(generation, "SHORT", short)
    monkeypatch.setattr(chats, "chat_logprobs", chat_logprobs)
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    body |= {"logprobs": True, "top_logprobs": 3}
    assert Http(backend).post("/v1/chat/completions", json=body).status_code == 200
    assert written == [name], "two tokens, each of which has four values"


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_is_counted_with_its_tokens(tmp_path: Path, streams: bool):
    backend = FakeBackend(tmp_path, "x" * 1000)
    backend.token_s = 0.002
    body = {"prompt": "abc", "max_tokens": 1000, "stream": streams}
    with served(lambda: backend) as at, httpx2.Client(base_url=at.url, timeout=PATIENCE) as client:
        if streams:
            with client.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_raw())
        else:
            with pytest.raises(httpx2.TimeoutException):
                client.post("/v1/completions", json=body, timeout=0.3)
        at.until(lambda: backend.answers and backend.answers[0].outcome.done())
        lines = dict(re.findall(r"^pdjax:(\w+)\{.*\} (\S+)$", client.get("/metrics").text, re.M))
        text = client.get("/metrics").text
    tokens = len(backend.answers[0].outcome.result().token_ids)
    assert 0 < tokens < 1000
    assert 'request_success_total{finished_reason="abort",model_name="fake"} 1.0' in text
    for name, value in (
        ("generation_tokens_total", tokens),
        ("request_generation_tokens_sum", tokens),
        ("prompt_tokens_total", 3),
        ("time_to_first_token_seconds_count", 1),
        ("e2e_request_latency_seconds_count", 0),
    ):
        assert float(lines[name]) == value, name
