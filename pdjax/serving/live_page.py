"""The page at `/`: static files that show, in a browser, what the other endpoints tell.

They hold nothing of the server, so that they need no key: the page asks for one, and sends it with
each request for data. It loads nothing from elsewhere, and its policy forbids to.
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"

_KINDS = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'; require-trusted-types-for 'script'"
)
_SAFE = {
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # it is asked for anew, and answered by a 304
}


class StaticFile(NamedTuple):
    """A file of the page: its bytes, and the headers of a response with them."""

    body: bytes
    headers: Mapping[str, str]


def _read(path: Path) -> StaticFile:
    body = path.read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
    return StaticFile(body, {**_SAFE, "content-type": _KINDS[path.suffix], "etag": tag})


FILES = {
    "/" if path.name == INDEX else f"/page/{path.name}": _read(path)
    for path in sorted(FOLDER.iterdir())
}
"""The files by the path of their URL."""


def routes() -> APIRouter:
    """The endpoints; they are no part of the schema."""
    router = APIRouter(include_in_schema=False)
    for path, file in FILES.items():
        router.add_api_route(path, partial(_respond, file), methods=["GET", "HEAD"])
    return router


async def _respond(file: StaticFile, request: Request) -> Response:
    if request.headers.get("if-none-match") == file.headers["etag"]:
        return Response(status_code=304, headers=file.headers)
    return Response(file.body, headers=file.headers)
