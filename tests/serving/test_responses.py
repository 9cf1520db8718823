"""`/v1/responses` with the official client against a server over a fake backend, and what it
refuses."""

import json
import math
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from openai.types import responses as types

from pdjax.serving.responses_body import RESPONSES_REFUSED
from tests.helpers.fake_backend import LENGTH, TEXT, FakeBackend, Served

pytestmark = pytest.mark.smoke


def as_told(model: Any) -> Any:
    """The model, read once more by its class, strictly: the client itself checks nothing."""
    return type(model).model_validate(model.to_dict(), strict=False)


def test_a_text_is_answered(client: OpenAI, backend: FakeBackend):
    made = as_told(
        client.responses.create(
            model="fake",
            input="hello",
            instructions="be kind",
            temperature=0.5,
            top_p=0.9,
            metadata={"a": "b"},
            user="u1",
            store=False,
            extra_headers={"x-request-id": "r1"},
        )
    )
    assert backend.prompt == "<system>be kind<user>hello<assistant>"
    assert (made.id, made.status, made.output_text) == ("resp_r1", "completed", TEXT)
    [item] = made.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert (made.temperature, made.top_p, made.metadata) == (0.5, 0.9, {"a": "b"})
    assert (made.instructions, made.error, made.incomplete_details) == ("be kind", None, None)
    prompt = len(backend.asked.prompt_token_ids)
    usage = made.usage
    assert (usage.input_tokens, usage.output_tokens) == (prompt, LENGTH)
    assert (usage.total_tokens, usage.input_tokens_details.cached_tokens) == (prompt + LENGTH, 2)
    params = backend.asked.params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.5, 0.9, 4096 - prompt)
    assert backend.asked.labels["user"] == "u1"


def test_a_conversation_may_hold_earlier_answers(client: OpenAI, backend: FakeBackend):
    first = client.responses.create(model="fake", input="hello")
    turns: Any = [
        {"role": "developer", "content": "be kind"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        *(item.to_dict() for item in first.output),
        {"role": "user", "content": "b"},
    ]
    assert client.responses.create(model="fake", input=turns).output_text == TEXT
    assert backend.prompt == f"<system>be kind<user>a<assistant>{TEXT}<user>b<assistant>"


def test_an_answer_that_was_cut_is_incomplete(client: OpenAI):
    made = as_told(client.responses.create(model="fake", input="x", max_output_tokens=2))
    assert (made.status, made.output_text, made.max_output_tokens) == ("incomplete", "Gr", 2)
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.output[0].status == "incomplete"
    stream = client.responses.create(model="fake", input="x", max_output_tokens=2, stream=True)
    last = as_told(list(stream)[-1])
    assert (last.type, last.response.output_text) == ("response.incomplete", "Gr")


def test_a_stream_has_the_events_in_their_order(client: OpenAI):
    events = [
        as_told(each) for each in client.responses.create(model="fake", input="x", stream=True)
    ]
    texts = [each for each in events if each.type == "response.output_text.delta"]
    assert "".join(each.delta for each in texts) == TEXT and len(texts) == len(TEXT)
    assert [each.type for each in events if each not in texts] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[4:-4] == texts
    assert [each.sequence_number for each in events] == [*range(len(events))]
    first, last = events[0], events[-1]
    assert (first.response.status, first.response.usage) == ("in_progress", None)
    assert (last.response.output_text, last.response.usage.output_tokens) == (TEXT, LENGTH)
    assert first.response.id == last.response.id
    assert isinstance(events[-2].item, types.ResponseOutputMessage)
    assert {each.item_id for each in texts} == {last.response.output[0].id}


def test_the_stream_helper_makes_the_whole_of_it(client: OpenAI):
    with client.responses.stream(model="fake", input="x") as stream:
        snapshots = [e.snapshot for e in stream if e.type == "response.output_text.delta"]
        assert snapshots[-1] == stream.get_final_response().output_text == TEXT


def test_a_failure_in_a_stream_is_an_error_event(client: OpenAI, backend: FakeBackend):
    backend.fails_after = 3
    events, failed = [], None
    try:
        for event in client.responses.create(model="fake", input="x", stream=True):
            events.append(event.type)
    except openai.APIError as error:
        failed = error
    assert failed is not None and "secret" not in failed.message
    assert "response.completed" not in events
    backend.fails_after = 1
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model="fake", input="x", stream=True)


def error_of(server: Served, **body: Any) -> dict[str, Any]:
    with httpx2.Client(base_url=server.url) as http:
        response = http.post(
            "/v1/responses",
            content=json.dumps({"input": "x", **body}),
            headers={"content-type": "application/json"},
        )
    assert response.status_code == 400, response.text
    return response.json()["error"]


@pytest.mark.parametrize("name", RESPONSES_REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(server: Served, name: str):
    error = error_of(server, **{name: "something"})
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    with httpx2.Client(base_url=server.url) as http:
        for nothing in (None, *RESPONSES_REFUSED[name]):
            body = {"input": "x", "max_output_tokens": 1, name: nothing}
            assert http.post("/v1/responses", json=body).status_code == 200


def test_nothing_is_kept_and_the_error_says_so(server: Served):
    for field in ({"store": True}, {"previous_response_id": "resp_1"}):
        assert "send the whole conversation" in error_of(server, **field)["message"]


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("input", {"input": []}),
        ("input", {"input": "x" * 5000}),
        ("input", {"input": 5}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("temperature", {"temperature": -1.0}),
        ("text.format", {"text": {"format": "json_object"}}),
        ("text.format.type", {"text": {"format": {"type": "grammar"}}}),
        ("text.format.schema", {"text": {"format": {"type": "json_schema", "name": "a"}}}),
        ("input[0].type", {"input": [{"type": "item_reference", "id": "x"}]}),
        ("input[0].role", {"input": [{"role": "tool", "content": "x"}]}),
        ("input[0].content", {"input": [{"role": "user"}]}),
        ("metadata", {"metadata": {"a": "\ud800"}}),
        ("metadata", {"metadata": {"\ud800": "a"}}),
        ("user", {"user": "\ud800"}),
        ("instructions", {"instructions": "\ud800"}),
        ("tools", {"tools": [{"type": "function", "name": "\ud800"}]}),
        ("tools", {"tools": [{"type": "function", "name": "f", "parameters": {"a": math.inf}}]}),
        ("text.format", {"text": {"format": {"type": "text", "a": math.nan}}}),
        ("tool_choice", {"tool_choice": {"type": "function", "name": "f", "a": "\ud800"}}),
        ("tools[0].type", {"tools": [{"type": "web_search"}]}),
        ("tools[0].name", {"tools": [{"type": "function"}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice.type", {"tool_choice": {"type": "allowed_tools"}}),
        ("input[0].type", {"input": [{"type": ["message"]}]}),
        ("input[0].call_id", {"input": [{"type": "function_call", "name": "f"}]}),
        ("input[0].output", {"input": [{"type": "function_call_output", "call_id": "a"}]}),
        (
            "input[0].content[0].type",
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        ),
        (
            "input[0].content[0]",
            {"input": [{"role": "user", "content": [{"type": ["input_text"]}]}]},
        ),
    ],
)
def test_a_wrong_value_is_refused_by_its_place(server: Served, param: str, body: dict[str, Any]):
    found = error_of(server, **body)["param"]
    assert found == param or (body.get("input") == 5 and found.startswith("input"))
