"""The OpenAPI document and the server say the same: bodies of answers, statuses, bounds of fields.
`examples/serving/schemathesis.sh` asks a running server much more."""

import json
from typing import Any

import pytest
from pydantic import BaseModel

from pdjax.serving.keys import ApiKey, digest_of
from pdjax.serving.openapi import answers, server_answers
from pdjax.serving.openapi.fields import FIELDS
from pdjax.serving.openapi.model_response import ModelResponse
from pdjax.serving.openapi.statuses import STATUSES, ErrorBody
from tests.helpers.fake_backend import FakeBackend
from tests.helpers.http_client import Http, error_of

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}
NEEDED = {"top_logprobs": {"logprobs": True}, "max_tokens": {"echo": True}}
"""What goes with a field at its bounds."""
REST = {"return_token_ids": True, "prompt_logprobs": 2}


@pytest.fixture(scope="module")
def made(backend: FakeBackend) -> dict[str, Any]:
    found: dict[str, Any] = Http(backend).get("/openapi.json").json()
    return found


def described(model: type[BaseModel], answer: Any) -> None:
    """Whether an answer has the fields that the document names, and no other."""
    assert model.model_validate(answer, strict=True).model_dump(exclude_unset=True) == answer


@pytest.mark.parametrize(
    ("path", "more", "model"),
    [
        ("/v1/completions", {}, answers.Completion),
        ("/v1/completions", {"logprobs": 2, "echo": True, "n": 2, **REST}, answers.Completion),
        ("/v1/completions", {"stop": "G"}, answers.Completion),
        ("/v1/chat/completions", {}, answers.ChatCompletion),
        ("/v1/chat/completions", {"logprobs": True, **REST}, answers.ChatCompletion),
        ("/v1/responses", {}, ModelResponse),
        ("/v1/responses", {"max_output_tokens": 2, "user": "a"}, ModelResponse),
        ("/tokenize", {}, server_answers.Tokenized),
        ("/tokenize", {"return_token_strs": True}, server_answers.Tokenized),
        ("/detokenize", {}, server_answers.Detokenized),
        ("/v1/models", None, server_answers.ModelList),
        ("/v1/models/fake", None, server_answers.ModelCard),
        ("/tokenizer_info", None, server_answers.TokenizerInfo),
        ("/nothing", None, ErrorBody),
        ("/v1/completions", {"n": 0}, ErrorBody),
    ],
)
def test_answers_have_the_fields_of_the_document(
    http: Http, path: str, more: dict[str, Any] | None, model: type[BaseModel]
):
    how = {} if more is None else {"json": {**BODIES[path], **more}}
    described(model, http.request("GET" if more is None else "POST", path, **how).json())


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/completions", answers.CompletionChunk),
        ("/v1/chat/completions", answers.ChatCompletionChunk),
    ],
)
def test_events_have_the_fields_of_the_document(http: Http, path: str, model: type[BaseModel]):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**BODIES[path], "stream": True, "stream_options": options, "return_token_ids": True}
    *events, done, _ = http.post(path, json=body).text.split("\n\n")
    assert len(events) > 2 and done == "data: [DONE]"
    for event in events:
        described(model, json.loads(event.removeprefix("data: ")))


def test_every_field_is_described_and_every_description_is_of_a_field(made: dict[str, Any]):
    schemas, used = made["components"]["schemas"], set()
    parts = ("StreamOptions", "Slo")
    requests = [name for name in schemas if name.endswith("Request") or name in parts]
    assert len(requests) == len(BODIES) + len(parts)
    for name in requests:
        for field, schema in schemas[name]["properties"].items():
            assert schema.get("description"), f"{name}.{field}"
            used.add(f"{name}.{field}" if f"{name}.{field}" in FIELDS else field)
    assert used == FIELDS.keys()


def test_every_operation_names_its_statuses(made: dict[str, Any]):
    for path, methods in made["paths"].items():
        for operation in methods.values():
            statuses = operation["responses"].keys() - {"200"}
            assert {"401", "405", "500", "503"} <= statuses <= {*map(str, STATUSES)}, path
            assert ("413" in statuses) == (path in BODIES)
            assert operation["summary"] and operation["description"]
            assert "422" not in statuses
    for path in BODIES:
        content = made["paths"][path]["post"]["responses"]["200"]["content"]
        assert ("text/event-stream" in content) == path.startswith("/v1/")
        assert content["application/json"]["schema"]["$ref"].startswith("#/components/schemas/")
    assert {"CompletionChunk", "ChatCompletionChunk"} <= made["components"]["schemas"].keys()


def edges(schema: dict[str, Any]) -> dict[str, tuple[list[Any], list[Any]]]:
    """The values at the bounds of a body's fields: those that are allowed, and those that are
    not."""
    found = {}
    for name, property_ in schema["properties"].items():
        allowed, refused = list[Any](), list[Any]()
        for branch in property_.get("anyOf", [property_]):
            step = 1 if branch.get("type") == "integer" else 1e-3
            for word, sign in (("minimum", -1), ("maximum", 1)):
                if word in branch:
                    allowed.append(branch[word])
                    refused.append(branch[word] + sign * step)
                exclusive = f"exclusive{word.capitalize()}"
                if exclusive in branch:
                    allowed.append(branch[exclusive] - sign * step)
                    refused.append(branch[exclusive])
        found[name] = allowed, refused
    return found


NEEDED = {"top_logprobs": {"logprobs": True}, "max_tokens": {"echo": True}}
"""What else a body must say for the bounds of a field to hold."""


@pytest.mark.parametrize("path", BODIES)
def test_the_bounds_of_the_document_are_those_of_the_server(
    http: Http, made: dict[str, Any], path: str
):
    name = made["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = made["components"]["schemas"][name["$ref"].split("/")[-1]]
    for field, (allowed, refused) in edges(schema).items():
        with_it = NEEDED.get(field, {})
        for value in allowed:
            response = http.post(path, json={**BODIES[path], **with_it, field: value})
            assert response.status_code == 200, f"{field}={value}: {response.text}"
        for value in refused:
            response = http.post(path, json={**BODIES[path], **with_it, field: value})
            assert error_of(response)["param"] == field, f"{field}={value}"


@pytest.mark.parametrize("path", BODIES)
def test_the_examples_of_the_document_are_answered(http: Http, made: dict[str, Any], path: str):
    name = made["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = made["components"]["schemas"][name["$ref"].split("/")[-1]]
    for field, property_ in schema["properties"].items():
        body = {} if path == "/tokenize" and field == "messages" else BODIES[path]
        for value in property_.get("examples", ()):
            response = http.post(path, json={**body, field: value})
            assert response.status_code == 200, f"{field}={value}: {response.text}"


def test_keys_are_in_the_document_where_there_are_some(made: dict[str, Any], backend: FakeBackend):
    assert "securitySchemes" not in made["components"]
    http = Http(backend, api_keys=(ApiKey("ann", digest_of("k1")),))
    keyed = http.get("/openapi.json", headers={"authorization": "Bearer k1"}).json()
    assert keyed["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert keyed["paths"]["/ready"]["get"]["security"] == []
