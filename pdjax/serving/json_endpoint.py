"""Endpoints whose bodies are JSON: from a body to its model, and what is told of one that is wrong.

FastAPI describes them in the OpenAPI document. Requests go to them directly: the layers of FastAPI
and Starlette take a third of a millisecond of a first token, and some of each later chunk. Bodies
are read by pydantic's reader, which takes a third of the time of Python's for token ids.
"""

import inspect
import json
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pdjax.core.messages import shown
from pdjax.serving.errors import ApiError
from pdjax.serving.sse import ClientGone


class JsonEndpoint:
    """An ASGI application. Its `receive` brings the whole body at once.

    Args:
      answer: makes the response from a request and its body.
      model: of the body.
    """

    def __init__(
        self, answer: Callable[[Request, Any], Awaitable[Response]], model: type[BaseModel]
    ) -> None:
        self._answer, self._model = answer, model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        notes, request = scope["state"]["notes"], Request(scope, receive)
        try:
            content = (await receive())["body"]
            body = body_of(self._model, request.headers.get("content-type", ""), content)
            response = await self._answer(request, body)
            await response(scope, receive, send)
        except ApiError as error:
            notes["error"] = error.code or error.kind
            raise
        except ClientGone:  # nobody reads the status; the log has it
            notes["client"] = "gone"
            await Response(status_code=499)(scope, receive, send)


def json_endpoints(routers: Iterable[APIRouter]) -> dict[str, JsonEndpoint]:
    """Those of routers by their paths: they take a request and its `body`."""
    return {
        route.path: JsonEndpoint(
            route.endpoint, inspect.signature(route.endpoint).parameters["body"].annotation
        )
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute) and "POST" in (route.methods or ())
    }


def body_of(model: type[BaseModel], kind: str, content: bytes) -> Any:
    """A body of a request.

    Args:
      model: of the body.
      kind: its `content-type`.
      content: as it came.

    Raises:
      ApiError: a 415 or 400; it names the first field that is wrong.
    """
    if not _JSON.match(kind):
        message = f"content-type={shown(kind)}: must be application/json"
        raise ApiError(415, message, code="unsupported_media_type")
    value = _read(content)
    if not isinstance(value, dict):
        message = f"body={shown(value)}: must be a JSON object"
        raise ApiError(400, message, code="invalid_type")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _wrong(error) from error


_JSON = re.compile(r"\s*application/([^;\s]+\+)?json\s*(;|$)", re.IGNORECASE)


def _read(content: bytes) -> Any:
    try:
        return from_json(content)
    except ValueError:  # Python's reader also takes UTF-16, and halves of surrogate pairs
        pass
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not valid JSON", code="invalid_json") from error


_TYPE = re.compile(r"str|(list|dict)\[.*\]")
"""Parts of a place in a body that name no field."""


def _wrong(error: ValidationError) -> ApiError:
    """The first field that is of another type."""
    errors = error.errors(include_url=False)
    # Where a field has several types, each says what is wrong: the one that has come furthest.
    same = [each for each in errors if each["loc"][:1] == errors[0]["loc"][:1]]
    first = max(same, key=lambda each: len(each["loc"]))
    where = ".".join(str(part) for part in first["loc"] if not _TYPE.fullmatch(str(part)))
    message = f"{where or 'body'}: {first['msg']}"
    if first["type"] != "missing":
        message = f"{where or 'body'}={shown(first.get('input'))}: {first['msg']}"
    return ApiError(400, message, param=where or None, code=first["type"])
