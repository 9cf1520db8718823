"""Bodies that are wrong in many ways at once, in a field of several types, or long."""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError

from pdjax.serving.requests import ChatRequest, CompletionRequest, TokenizeRequest
from pdjax.serving.responses_body import ResponsesRequest
from pdjax.serving.text_threads import BRIEF
from pdjax.text.tokenizer import Tokenizer
from tests.helpers.fake_backend import FakeBackend
from tests.helpers.http_client import Http, error_of


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("completions", {"prompt": "x", "stop": 1}, "stop", "stop=1: "),
        ("completions", {"prompt": "x", "stop": ["a", 1]}, "stop.1", "stop.1=1: "),
        ("chat/completions", {"messages": [1]}, "messages.0", "messages.0=1: "),
        ("responses", {"input": None}, "input", "input=None: "),
        ("responses", {"input": [1]}, "input.0", "input.0=1: "),
    ],
)
def test_an_error_names_the_field_and_no_type(
    tmp_path: Path, path: str, body: Any, param: str, message: str
):
    error = error_of(Http(FakeBackend(tmp_path)).post(f"/v1/{path}", json=body))
    assert error["param"] == param and error["message"].startswith(message), error


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (CompletionRequest, "stop_token_ids"),
        (CompletionRequest, "stop"),
        (ChatRequest, "messages"),
        (ChatRequest, "tools"),
        (ChatRequest, "documents"),
        (ResponsesRequest, "input"),
        (TokenizeRequest, "messages"),
        (TokenizeRequest, "tools"),
    ],
)
def test_of_a_million_wrong_items_one_is_told(body: type[BaseModel], field: str):
    """Each error that is told takes about a KiB, and microseconds of the event loop."""
    with pytest.raises(ValidationError) as caught:
        body.model_validate({"prompt": "x", "messages": [], "input": "x", field: [1.5] * 1000})
    assert caught.value.error_count() <= 2  # one of each type that the field may have


def test_texts_of_single_tokens_are_not_made_on_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loops, decode = [], Tokenizer.decode

    def seen(self: Tokenizer, *args: Any, **how: Any) -> str:
        with suppress(RuntimeError):
            loops.append(asyncio.get_running_loop())
        return decode(self, *args, **how)

    monkeypatch.setattr(Tokenizer, "decode", seen)
    long = "long" * BRIEF
    body = {"prompt": long, "return_token_strs": True}
    told = Http(FakeBackend(tmp_path)).post("/tokenize", json=body).json()
    assert told["token_strs"] == [*long]
    assert not loops


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        (" Application/JSON ; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        ("application/jsonp", 415),
        ("text/json", 415),
        ("", 415),
    ],
)
def test_a_body_is_read_that_says_that_it_is_json(tmp_path: Path, kind: str, status: int):
    http = Http(FakeBackend(tmp_path))
    content, headers = b'{"prompt": "x", "max_tokens": 2}', {"content-type": kind}
    told = http.post("/v1/completions", content=content, headers=headers)
    assert told.status_code == status, told.text


def test_every_endpoint_with_a_body_takes_its_requests_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    http = Http(FakeBackend(tmp_path))

    async def refuse(*args: Any) -> None:
        raise AssertionError("a layer between the gate and the endpoint")

    monkeypatch.setattr(FastAPI, "__call__", refuse)
    for path, body in {
        "/v1/completions": {"prompt": "x", "max_tokens": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/responses": {"input": "x"},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [97]},
    }.items():
        assert http.post(path, json=body).status_code == 200, path
