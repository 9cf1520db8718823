"""What the document says of answers that are none: a status, when it comes, and its headers."""

from typing import Any

from pydantic import BaseModel


class ErrorFields(BaseModel):
    """What is told of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorFields


_RETRY = {
    "Retry-After": {
        "description": "Seconds after which to come again.",
        "schema": {"type": "integer", "minimum": 0},
    }
}

STATUSES: dict[int, str] = {
    400: "A body that is no JSON, a wrong type or value, a prompt that does not fit, or a "
    "parameter that is not supported; `param` names it. Or an SLO that no empty server could meet.",
    401: "An API key is missing or wrong.",
    404: "No such model or path.",
    405: "The path has no such method.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not `application/json`.",
    429: "The queue is full.",
    500: "The request failed on the way; the server's log says why, under its `x-request-id`.",
    503: "The model loads, the server drains, or the request would be late and was shed.",
}

_OF_ALL = (401, 405, 500, 503)
_OF_BODIES = (400, 404, 408, 413, 415)


def errors(*more: int, body: bool = False) -> dict[int | str, dict[str, Any]]:
    """The answers of an endpoint that are errors.

    Args:
      more: statuses besides those of every endpoint.
      body: whether it reads a body.
    """
    found = sorted({*_OF_ALL, *(_OF_BODIES if body else ()), *more})
    return {status: _error(status) for status in found}


def _error(status: int) -> dict[str, Any]:
    told: dict[str, Any] = {"model": ErrorBody, "description": STATUSES[status]}
    return told | ({"headers": _RETRY} if status in (429, 503) else {})
