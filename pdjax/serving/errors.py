"""Errors in the shape of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pdjax.core.messages import shown
from pdjax.core.request import QueueFull
from pdjax.session import Closed

RETRY_AFTER_S = 1
"""Seconds after which a client that was refused for want of room may come again. Clients take at
most 120."""


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
      status: of HTTP.
      message: one sentence; holds nothing of the host.
      kind: `type` in the body.
      param: the field that is at fault.
      code: for programs.
      headers: further ones of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON of the response, or of an event of a stream."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def not_supported(param: str, message: str | None = None) -> ApiError:
    """A 400 for a parameter that is known and that this server does not have."""
    text = message or f"{param}: is not supported by this server; leave it out"
    return ApiError(400, text, param=param, code="unsupported_parameter")


def bad_value(param: str, value: object, allowed: str) -> ApiError:
    """A 400 for a value that is not allowed."""
    message = f"{param}={shown(value)}: {allowed}"
    return ApiError(400, message, param=param, code="invalid_value")


def draining() -> ApiError:
    """A 503 for a server that is about to end."""
    return ApiError(
        503,
        "the server is shutting down and takes no further requests",
        kind="server_error",
        code="shutting_down",
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )


def failed(request_id: str) -> ApiError:
    """A 500 for a request that failed on the way. Why is in the log, by its id; to ask again would
    most likely fail again."""
    return ApiError(
        500,
        f"the request failed; the server's log says why, under request id {request_id}",
        kind="server_error",
        code="request_failed",
        headers={"x-should-retry": "false"},
    )


def shed(reason: str) -> ApiError:
    """A request that the admission policy has refused, for a reason that begins with its cause: a
    400 where no other time would be better, else a 503."""
    cause, _, why = reason.partition(": ")
    if cause == "impossible":
        named = re.match(r"\w+", why)
        param = None if named is None else named[0]
        return ApiError(400, why, param=param, code="slo_impossible")
    code = "deadline_exceeded" if cause == "deadline" else "overloaded"
    return ApiError(
        503,
        f"the request was shed: {why}",
        kind="server_error",
        code=code,
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )


def internal(request_id: str) -> ApiError:
    """A 500 for an error of the server itself, of which the client learns nothing."""
    return ApiError(
        500,
        f"the server failed; its log says why, under request id {request_id}",
        kind="server_error",
        code="internal_error",
        headers={"x-should-retry": "false"},
    )


@contextmanager
def fields_called(names: Mapping[str, str]) -> Iterator[None]:
    """Within it, an error of a field names it as this kind of request does; `names` are those, by
    the core's."""
    try:
        yield
    except ApiError as error:
        called = names.get(error.param or "")
        if called is not None:
            error.message = error.message.replace(error.param or "", called, 1)
            error.param = called
        raise


_FIELDS = {"prompt_token_ids": "prompt", "chat": "messages", "chat_template": "messages"}
"""Names in messages of the core, as clients call them."""


def of_submit(error: Exception) -> ApiError:
    """What a client is told when a backend refuses its request, or a tokenizer its text."""
    if isinstance(error, QueueFull):
        return ApiError(
            429,
            f"the queue is full: {error}",
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(RETRY_AFTER_S)},
        )
    if isinstance(error, Closed):
        return draining()
    message = str(error)
    named = re.match(r"\w+", message)
    param = None if named is None else _FIELDS.get(named[0], named[0])
    too_long = "the context is" in message or "pool holds" in message
    code = "context_length_exceeded" if too_long else "invalid_value"
    return ApiError(400, message, param=param, code=code)
