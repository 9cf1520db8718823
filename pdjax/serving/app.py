"""The server as an ASGI application: endpoints behind a gate, and errors in OpenAI's shape."""

from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from pdjax.serving import chats, completions, live_page, responses, state, tokens
from pdjax.serving.errors import ApiError, internal
from pdjax.serving.front import Front
from pdjax.serving.json_endpoint import json_endpoints
from pdjax.serving.middleware import App, Gate
from pdjax.serving.openapi.document import document

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
    routers = [part.routes(front) for part in (completions, chats, responses, tokens, state)]
    for router in (*routers, live_page.routes()):
        app.include_router(router)
    most_choices = front.backend.model.max_choices
    app.openapi = document(app, bool(front.settings.api_keys), most_choices)  # type: ignore[method-assign]
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal)  # raised once more, for the log
    gate = Gate(app, json_endpoints(routers), front, PATHS)
    return _with_cors(gate, front.settings.cors_origins)


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


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path or method."""
    assert isinstance(error, HTTPException)
    reason = HTTPStatus(error.status_code).phrase.lower()
    message = f"{request.method} {request.url.path[:200]}: {reason}"
    known = dict(error.headers or {})
    return _response(ApiError(error.status_code, message, headers=known))


async def _internal(request: Request, error: Exception) -> Response:
    del error
    return _response(internal(request.scope["state"]["request_id"]))
