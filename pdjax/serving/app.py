"""The server as an ASGI application: endpoints behind a gate, and errors in OpenAI's shape."""

import re
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from pdjax.core.messages import shown
from pdjax.serving import chats, completions, live_page, responses, state, tokens
from pdjax.serving.errors import ApiError, internal
from pdjax.serving.front import Front
from pdjax.serving.middleware import App, Gate
from pdjax.serving.openapi.document import document
from pdjax.serving.sse import ClientGone

PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/models"),
    *("/tokenize", "/detokenize", "/tokenizer_info"),
    *("/health", "/ready", "/metrics", "/engines", "/requests", "/openapi.json"),
    *live_page.FILES,
)
"""Paths that the metrics name."""


def make_app(front: Front) -> App:
    """The application; its schema is at `/openapi.json`."""
    app = FastAPI(
        title="pdjax",
        version=version("pdjax"),
        summary="Language models, with prefill and decode on different device meshes.",
        docs_url=None,  # the page would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    for part in (completions, chats, responses, tokens, state):
        app.include_router(part.routes(front))
    app.include_router(live_page.routes())
    most_choices = front.backend.model.max_choices
    app.openapi = document(app, bool(front.settings.api_keys), most_choices)  # type: ignore[method-assign]
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _bad_body)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(Exception, _internal)  # raised once more, for the log
    return _with_cors(Gate(app, front, PATHS), front.settings.cors_origins)


def _with_cors(app: App, origins: tuple[str, ...]) -> App:
    """Let pages of these origins read the answers. A browser asks first, without a key, so that
    this stands before the gate."""
    if not origins:
        return app
    allowed: Any = CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after", "traceparent"],
        max_age=600,
    )
    return allowed


def _response(error: ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.scope["state"]["notes"]["error"] = error.code or error.kind
    return _response(error)


_TYPE = re.compile(r"body|str|(list|dict)\[.*\]")
"""Parts of a place in a body that name no field."""


async def _bad_body(request: Request, error: Exception) -> Response:
    """The first field that is of another type, or a body that is no JSON."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    # Where a field has several types, each says what is wrong: the one that has come furthest.
    same = [each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]]
    first = max(same, key=lambda each: len(each["loc"]))
    if isinstance(error.body, bytes):  # it was not read as JSON, for what its header says
        kind = request.headers.get("content-type", "")
        message = f"content-type={shown(kind)}: must be application/json"
        return _response(ApiError(415, message, code="unsupported_media_type"))
    if first["loc"] == ("body",) and first["type"] == "model_attributes_type":
        message = f"body={shown(error.body)}: must be a JSON object"
        return _response(ApiError(400, message, code="invalid_type"))
    where = ".".join(str(part) for part in first["loc"][1:] if not _TYPE.fullmatch(str(part)))
    if first["type"] == "json_invalid":
        return _response(_no_json())
    message = f"{where or 'body'}: {first['msg']}"
    if first["type"] != "missing":
        message = f"{where or 'body'}={shown(first.get('input'))}: {first['msg']}"
    return _response(ApiError(400, message, param=where or None, code=first["type"]))


def _no_json() -> ApiError:
    return ApiError(400, "the body is not valid JSON", code="invalid_json")


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path or method, or a body that can't be read."""
    assert isinstance(error, HTTPException)
    reason = HTTPStatus(error.status_code).phrase.lower()
    if error.status_code == 400:
        return _response(_no_json())
    message = f"{request.method} {request.url.path[:200]}: {reason}"
    known = dict(error.headers or {})
    return _response(ApiError(error.status_code, message, headers=known))


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads it; the log has it."""
    request.scope["state"]["notes"]["client"] = "gone"
    return Response(status_code=499)


async def _internal(request: Request, error: Exception) -> Response:
    del error
    return _response(internal(request.scope["state"]["request_id"]))
