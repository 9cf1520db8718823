"""For each file of tests that asks for it a fake backend; its application without a socket, or a
server over it and the official client."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.helpers.fake_backend import FakeBackend, Served, served
from tests.helpers.http_client import Http


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> FakeBackend:
    return FakeBackend(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def http(backend: FakeBackend) -> Http:
    return Http(backend)


@pytest.fixture(scope="module")
def server(backend: FakeBackend) -> Iterator[Served]:
    with served(lambda: backend) as at:
        yield at


@pytest.fixture
def client(server: Served, backend: FakeBackend) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    server.until(lambda: not server.front.answers)
    backend.reset()
