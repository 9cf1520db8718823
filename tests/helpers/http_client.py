"""Requests to the server's application without a socket."""

import asyncio
from dataclasses import replace
from typing import Any

import httpx2

from pdjax.serving.app import make_app
from pdjax.serving.front import Front, Settings
from tests.helpers.fake_backend import FakeBackend


class Http:
    """Requests to an application, without a socket."""

    def __init__(self, backend: FakeBackend, **settings: Any) -> None:
        backend.reset()
        self.front = Front(backend, replace(Settings(), **settings))
        self.app = make_app(self.front)

    def request(self, method: str, path: str, **how: Any) -> httpx2.Response:
        async def ask() -> httpx2.Response:
            transport = httpx2.ASGITransport(self.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, **how)

        return asyncio.run(ask())

    def get(self, path: str, **how: Any) -> httpx2.Response:
        return self.request("GET", path, **how)

    def post(self, path: str, **how: Any) -> httpx2.Response:
        return self.request("POST", path, **how)


def error_of(response: httpx2.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
