"""What every request passes before an endpoint sees it: its id, its key, the bounds of its body;
and the log line that it leaves.

It is plain ASGI: Starlette's own base class hides that a client has gone.
"""

import asyncio
import json
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from pdjax.core.clock import unix_ns
from pdjax.serving import live_page
from pdjax.serving.errors import ApiError, internal
from pdjax.serving.front import Front
from pdjax.serving.keys import name_of
from pdjax.serving.logs import LOG, event
from pdjax.serving.open_answer import OpenAnswer
from pdjax.serving.protocol import check_head
from pdjax.serving.request_span import Exchange
from pdjax.serving.trace_context import trace_context

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset(["/health", "/ready", *live_page.FILES])
"""Paths that need no key: they say only whether the server lives, and takes requests; and the files
of the page."""
QUIET_PATHS = frozenset([*OPEN_PATHS, "/metrics", "/engines", "/requests"])
"""Paths that are asked all the time; their log lines are for debugging."""

MAX_BRACKETS = 1 << 18
"""Brackets of a body that open an array or an object: to read one takes a microsecond, in which the
event loop does nothing else. The tokens of a prompt are one array."""

_ID = re.compile(r"[\x21-\x7e]{1,128}")


class _Gone(Exception):
    """The client has gone while its body was read."""


class Gate:
    """Lets requests through to `app`.

    Args:
      app: has the endpoints.
      posts: those of POST that take their requests directly, by path.
      front: counts what is under way, and has the settings.
      paths: that are served; all others are one in the metrics.
    """

    def __init__(
        self, app: App, posts: Mapping[str, App], front: Front, paths: Iterable[str]
    ) -> None:
        self._app, self._posts = app, posts
        self._front, self._paths = front, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passing = _Passing(scope, send)
        self._front.requests += 1
        try:
            await self._serve(passing, scope, receive)
        except ApiError as error:
            await passing.refuse(error)
        except _Gone:
            passing.notes["client"] = "gone"
        except Exception:
            # A path or a traceback is for the log alone. What has begun is broken off by uvicorn.
            LOG.error("request_failed", exc_info=True, extra={"fields": {"request_id": passing.id}})
            if passing.status is None:
                await passing.refuse(internal(passing.id))
        finally:
            self._front.requests -= 1
            self._log(passing, scope)
            if self._front.traces and scope["path"] not in QUIET_PATHS:
                self._front.traces.tell(passing.exchange(scope))

    async def _serve(self, passing: "_Passing", scope: Scope, receive: Receive) -> None:
        check_head(scope)
        keys = self._front.settings.api_keys
        if keys and scope["path"] not in OPEN_PATHS:
            passing.key = name_of(keys, passing.header("authorization"))
            if passing.key is None:
                raise ApiError(
                    401,
                    "an API key of this server is needed, as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        scope["state"] = {
            **scope.get("state", {}),
            "request_id": passing.id,
            "trace_id": None if passing.trace is None else passing.trace.trace_id,
            "key": passing.key,
            "notes": passing.notes,
            "answers": passing.answers,
        }
        if scope["method"] in ("POST", "PUT", "PATCH"):
            receive = await self._with_body(passing, receive)
        app = self._posts.get(scope["path"], self._app) if scope["method"] == "POST" else self._app
        await app(scope, receive, passing.send)

    async def _with_body(self, passing: "_Passing", receive: Receive) -> Receive:
        """Read the body, within its bounds; a `receive` that hands it out again.

        Raises:
          ApiError: a 413 or 408.
        """
        settings = self._front.settings
        length = passing.header("content-length") or ""
        if length.isdecimal() and int(length[:20]) > settings.max_body:
            raise _too_large(f"{settings.max_body} bytes")
        try:
            async with asyncio.timeout(settings.body_s):
                body = await _read(receive, settings.max_body)
        except TimeoutError as error:
            raise ApiError(408, f"the body did not come within {settings.body_s} s") from error
        if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
            raise _too_large(f"{MAX_BRACKETS} arrays and objects, counting brackets in texts")
        told = False

        async def again() -> MutableMapping[str, Any]:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        return again

    def _log(self, passing: "_Passing", scope: Scope) -> None:
        path = scope["path"]
        known = path if path in self._paths else "other"
        if passing.status is not None:
            self._front.metrics.responded(known, passing.status)
        event(
            "request",
            logging.DEBUG if path in QUIET_PATHS else logging.INFO,
            request_id=passing.id,
            **passing.traced(),
            method=scope["method"],
            path=path[:200],
            status=passing.status,
            ms=round(passing.elapsed * 1e3, 1),
            key=passing.key,
            **passing.notes,
        )


class _Passing:
    """One request on its way.

    Attributes:
      id: what the client calls it, where that can stand in a header; else a new one.
      trace: where it stands in its client's trace.
      key: name of its API key.
      status: of the response, once that has begun.
      notes: what an endpoint adds to the log line.
      answers: those that an endpoint has asked for.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self._headers, self._send = scope["headers"], send
        self._loop = asyncio.get_running_loop()
        self._began, self._began_ns = self._loop.time(), unix_ns()
        given = self.header("x-request-id") or ""
        self.id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        self.trace = trace_context(self.header("traceparent"))
        self.key: str | None = None
        self.status: int | None = None
        self.notes: dict[str, Any] = {}
        self.answers: list[OpenAnswer] = []

    def header(self, name: str) -> str | None:
        """A header of the request; None where it has none."""
        wanted = name.encode()
        return next(
            (value.decode("latin-1") for key, value in self._headers if key == wanted), None
        )

    def traced(self) -> dict[str, str]:
        """What the log line says of the trace."""
        if self.trace is None:
            return {}
        known = self.trace._asdict()
        return {name: known[name] for name in ("trace_id", "parent_id", "span_id")}

    def exchange(self, scope: Scope) -> Exchange:
        """What traces tell of it."""
        gone, status = "client" in self.notes, self.status
        error = "client_gone" if gone else self.notes.get("error")
        if error is None and status is not None and status >= 400:
            error = str(status)
        moments = self._began_ns, unix_ns()
        kind, path = scope["method"], scope["path"]
        return Exchange(self.trace, kind, path, status, *moments, error, self.answers)

    @property
    def elapsed(self) -> float:
        """Seconds since it came."""
        return self._loop.time() - self._began

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Pass a part of the response on, with the request's id and its place in the trace."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
            if self.trace is not None:
                headers.append((b"traceparent", self.trace.header.encode()))
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Respond with an error."""
        body = json.dumps(error.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        headers |= {name.lower(): value for name, value in error.headers.items()}
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})


async def _read(receive: Receive, most: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise _too_large(f"{most} bytes")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(most: str) -> ApiError:
    return ApiError(413, f"the body has more than {most}", code="request_too_large")
