"""The OpenAPI document, from the endpoints' own types: what FastAPI makes of them, and what is said
of fields, streams and keys besides."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pdjax.serving.openapi.answers import ChatCompletionChunk, CompletionChunk
from pdjax.serving.openapi.fields import FIELDS, FieldNote
from pdjax.serving.openapi.statuses import errors

_REFERENCE = "#/components/schemas/{model}"
EVENTS: tuple[type[BaseModel], ...] = (CompletionChunk, ChatCompletionChunk)
"""Objects of streams; the document has them though no answer is one of them alone."""


def answers(
    model: type[BaseModel], *, stream: str | None = None, limited: bool = False
) -> dict[int | str, dict[str, Any]]:
    """`responses` of an endpoint that reads a body.

    Args:
      model: of its answer.
      stream: what the events of its streams are, in words; None where it has none.
      limited: whether it may answer 429.
    """
    whole: dict[str, Any] = {"model": model, "description": "The answer."}
    if stream is not None:
        event = {"data": {"type": "string"}, "event": {"type": "string"}}
        events = {"description": f"Server-sent events: {stream}", "properties": event}
        whole["content"] = {"text/event-stream": {"schema": events}}
        whole["description"] = "The answer; with `stream`, events."
    return {200: whole, **errors(*([429] if limited else []), body=True)}


def told(model: type[BaseModel], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of an endpoint that reads no body and tells of the server.

    Args:
      model: of its answer.
      statuses: of its errors, besides those of every endpoint.
    """
    return {200: {"model": model, "description": "The answer."}, **errors(*statuses)}


def chunks(model: type[BaseModel]) -> str:
    """What the events of a stream of chunks are."""
    return f"`data: ` and a {model.__name__} each, and `data: [DONE]` at the end."


def document(app: FastAPI, has_keys: bool, most_choices: int) -> Callable[[], dict[str, Any]]:
    """The function that makes an application's document, once.

    Args:
      app: has the endpoints.
      has_keys: whether requests need an API key.
      most_choices: sequences that may wait: no request has more choices.
    """
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(
                get_openapi(
                    title=app.title, version=app.version, summary=app.summary, routes=app.routes
                )
            )
            _drop_unused(made)
            _add_events(made)
            _add_notes(made["components"]["schemas"], most_choices)
            if has_keys:
                _add_keys(made)
        return made

    return openapi


def _drop_unused(made: dict[str, Any]) -> None:
    """FastAPI's own errors of validation, which are answered in the form of all others."""
    for methods in made["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        made["components"]["schemas"].pop(name, None)


def _add_events(made: dict[str, Any]) -> None:
    _, schemas = models_json_schema(
        [(model, "serialization") for model in EVENTS], ref_template=_REFERENCE
    )
    made["components"]["schemas"] |= schemas["$defs"]


def _add_notes(schemas: dict[str, Any], most_choices: int) -> None:
    """Say of each field of a request what `FIELDS` says."""
    for name, schema in schemas.items():
        if not (name.endswith("Request") or name in ("StreamOptions", "Slo")):
            continue
        for field, property_ in schema.get("properties", {}).items():
            note = FIELDS.get(f"{name}.{field}", FIELDS.get(field))
            if note is not None:
                _annotate(property_, note)
        for branch in schema.get("properties", {}).get("n", {}).get("anyOf", ()):
            if branch["type"] == "integer":
                branch["maximum"] = most_choices


def _annotate(property_: dict[str, Any], note: FieldNote) -> None:
    property_["description"] = note.text
    if note.example is not None:
        property_["examples"] = [note.example]
    for branch in property_.get("anyOf", [property_]):
        items = branch.get("items", {})
        for word, bound in note.bounds.items():
            if word == "minItems":
                branch |= {word: bound} if "items" in branch else {}
            elif word == "items":
                items |= bound
            elif branch.get("type") in _KINDS[word]:
                branch[word] = bound
            elif items.get("type") in _KINDS[word]:
                items[word] = bound


_NUMBERS = ("number", "integer")
_KINDS = {
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _NUMBERS),
    **dict.fromkeys(("minLength", "maxLength"), ("string",)),
}
"""The types that a keyword is of."""


def _add_keys(made: dict[str, Any]) -> None:
    """Every path but the probes needs a key."""
    made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in made["paths"].items():
        for operation in methods.values():
            operation["security"] = [] if path in ("/health", "/ready") else [{"key": []}]
