#!/usr/bin/env bash
# Expected: request.is_disconnected() turns True once the client has gone, also behind a
# BaseHTTPMiddleware that only passes the request on.
#
# Happens: behind it the endpoint never learns. The same endpoint without the middleware sees the
# disconnect at the next look. The server has the message ready all the time; the receive channel
# that the middleware puts in between does not show it to a look.
#
# Why it matters for serving: polling is_disconnected() while a request waits for its first token is
# how servers abort the work of clients that left. One harmless middleware (a timer, a request id)
# turns it off, and the engine decodes for nobody.
#
# Versions: starlette 1.10.0, anyio 4.16.0 on Python 3.11. The script calls the ASGI application
# directly.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile \
    --disable-pip-version-check starlette==1.10.0 anyio==4.16.0 || exit 2
cd "$folder"

"$folder/venv/bin/python" - <<'PY'
import asyncio
import sys
from importlib.metadata import version

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

print("starlette", version("starlette"), "anyio", version("anyio"))


class PassOn(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        return await call_next(request)


def looks_until_seen(middleware):
    looks = []

    async def endpoint(request):
        for _ in range(20):
            looks.append(await request.is_disconnected())
            if looks[-1]:
                break
            await asyncio.sleep(0.05)
        return PlainTextResponse("")

    app = Starlette(routes=[Route("/", endpoint)], middleware=middleware)
    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive():
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message):
        pass

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": "GET", "scheme": "http", "path": "/", "raw_path": b"/", "root_path": "",
        "query_string": b"", "headers": [], "server": ("test", 80), "client": ("test", 1),
    }
    asyncio.run(app(scope, receive, send))
    return looks


plain, behind = looks_until_seen([]), looks_until_seen([Middleware(PassOn)])
print("without middleware: seen at look", plain.index(True) + 1 if True in plain else "never")
print("behind BaseHTTPMiddleware:", "seen" if True in behind else f"never, in {len(behind)} looks")
holds = True in plain and len(plain) <= 3 and behind == [False] * 20
print("a middleware hides that the client left" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
