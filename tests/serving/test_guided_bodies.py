"""What bodies say of the form of an answer and of single tokens."""

import json
from pathlib import Path
from typing import Any

import pytest

from pdjax.core.guide import Guide
from pdjax.core.request import SamplingParams
from pdjax.serving.errors import ApiError
from pdjax.serving.requests import ChatRequest, CompletionRequest
from pdjax.serving.responses_body import ResponsesRequest
from tests.helpers.fake_backend import FakeBackend
from tests.helpers.http_client import Http

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
NAMED = {"name": "answer", "schema": SCHEMA, "strict": True}


def of_chat(**body: Any) -> SamplingParams:
    return ChatRequest.model_validate_json(json.dumps({"messages": [], **body})).params()


def of_response(**body: Any) -> SamplingParams:
    return ResponsesRequest.model_validate_json(json.dumps({"input": "x", **body})).params()


@pytest.mark.parametrize(
    ("body", "guide"),
    [
        ({"response_format": {"type": "text"}, "structured_outputs": {}}, None),
        ({"response_format": {"type": "json_object"}}, Guide.json_object()),
        (
            {"response_format": {"type": "json_schema", "json_schema": NAMED}},
            Guide.json_schema(SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, Guide.json_schema(SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Guide.json_schema(SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, Guide.json_object()),
        ({"structured_outputs": {"regex": "a+"}}, Guide.regex("a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Guide.choices(["a", "b"])),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Guide.grammar('start: "a"')),
        ({"guided_json": SCHEMA}, Guide.json_schema(SCHEMA)),
        ({"guided_regex": "a+"}, Guide.regex("a+")),
        ({"guided_choice": ["a", "b"]}, Guide.choices(["a", "b"])),
        ({"guided_grammar": 'start: "a"'}, Guide.grammar('start: "a"')),
    ],
)
def test_the_form_of_an_answer(body: dict[str, Any], guide: Guide | None):
    assert of_chat(**body).guide == guide
    if "response_format" in body:
        body = {"text": {"format": {**body["response_format"], **NAMED}}}
    assert of_response(**body).guide == guide


def test_biases_and_bounds_of_tokens():
    body = {"prompt": [1], "logit_bias": {"5": -100, "50256": 0.5}, "min_tokens": 3}
    params = CompletionRequest.model_validate(body | {"allowed_token_ids": [5, 6]}).params()
    assert params.logit_bias == {5: -100, 50256: 0.5}
    assert (params.min_tokens, params.allowed_token_ids) == (3, (5, 6))
    assert not of_chat(logit_bias={}, min_tokens=0, allowed_token_ids=[]).constrained


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "invalid_value",
        ),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex", "invalid_value"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "invalid_value",
        ),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "invalid_value"),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs.structural_tag",
            "unsupported_parameter",
        ),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": True}}, "logit_bias", "invalid_value"),
        ({"min_tokens": -1}, "min_tokens", "invalid_value"),
    ],
)
def test_what_is_no_form_is_refused_by_its_field(body: dict[str, Any], param: str, code: str):
    with pytest.raises(ApiError) as error:
        of_chat(**body)
    assert (error.value.status, error.value.param, error.value.code) == (400, param, code)


def test_a_response_repeats_its_format(tmp_path: Path):
    asked = {"type": "json_schema", **NAMED}
    answer = Http(FakeBackend(tmp_path)).post(
        "/v1/responses", json={"input": "x", "text": {"format": asked}}
    )
    assert answer.json()["text"]["format"] == asked
