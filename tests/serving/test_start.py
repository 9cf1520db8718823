"""What a client finds while the model loads, and TLS."""

import ssl
import threading
from collections import Counter
from pathlib import Path

import httpx2
import pytest

from pdjax.serving.loading import answering
from pdjax.serving.server import listening_socket, url_of
from pdjax.serving.tls import tls_context
from tests.helpers import certificates
from tests.helpers.fake_backend import PATIENCE, FakeBackend, served


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> certificates.Files:
    return certificates.made_in(tmp_path_factory.mktemp("tls"))


def client_of(url: str, certificate: str | None = None) -> httpx2.Client:
    trusting = ssl.create_default_context(cafile=certificate)
    transport = httpx2.HTTPTransport(retries=5, verify=trusting)
    return httpx2.Client(base_url=url, timeout=PATIENCE, transport=transport)


@pytest.mark.parametrize("safe", [False, True], ids=["http", "https"])
def test_while_the_model_loads_all_but_health_has_to_wait(safe: bool, files: certificates.Files):
    tls = tls_context(files.certificate, files.key) if safe else None
    with (
        listening_socket("127.0.0.1", 0) as found,
        answering(found, tls),
        client_of(url_of(found, safe), files.certificate) as client,
    ):
        assert client.get("/health").text == "ok\n"
        for response in (
            client.get("/ready"),
            client.get("/v1/models"),
            client.post("/v1/completions", json={"prompt": "x" * 10_000}),
        ):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "loading"
            assert (response.headers["retry-after"], response.headers["connection"]) == (
                "2",
                "close",
            )
        assert client.head("/ready").status_code == 503
        page = client.get("/")
        assert page.status_code == 200 and "<title>pdjax</title>" in page.text


def test_the_socket_goes_on_after_the_loading():
    """A client that comes between the two servers waits for the second one."""
    with listening_socket("127.0.0.1", 0) as found:
        found.listen()
        seen: Counter[int] = Counter()
        end = threading.Event()

        def ask() -> None:
            with client_of(url_of(found)) as client:
                while not end.is_set():  # an error ends the thread
                    seen[client.get("/ready").status_code] += 1

        asking = threading.Thread(target=ask)
        asking.start()
        for _ in range(3):
            with answering(found):
                before = seen[503]
                while seen[503] < before + 2 and asking.is_alive():
                    end.wait(0.01)
        with answering(found):
            assert asking.is_alive()
            end.set()
            asking.join(PATIENCE)
        assert set(seen) == {503} and not asking.is_alive()


def test_a_server_with_a_certificate_speaks_tls(tmp_path: Path, files: certificates.Files):
    tls = tls_context(files.certificate, files.key)
    with served(lambda: FakeBackend(tmp_path), tls=tls) as at:
        assert at.url.startswith("https://")
        with client_of(at.url, files.certificate) as client:
            body = {"prompt": "x", "max_tokens": 3, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                assert [*response.iter_lines()][-2] == "data: [DONE]"
        with (
            httpx2.Client(base_url=at.url.replace("https", "http")) as plain,
            pytest.raises(httpx2.TransportError),
        ):
            plain.get("/health")


@pytest.mark.parametrize(
    ("certificate", "key", "message"),
    [
        (None, "key", "a key needs its certificate"),
        ("/nowhere", "key", "No such file"),
        ("certificate", "/nowhere", "No such file"),
        ("certificate", None, "PEM"),
        ("certificate", "encrypted_key", "the key is encrypted"),
    ],
)
def test_files_that_can_not_serve_are_refused(
    certificate: str | None, key: str | None, message: str, files: certificates.Files
):
    certificate, key = (
        getattr(files, name) if name in certificates.Files._fields else name
        for name in (certificate, key)
    )
    with pytest.raises(ValueError, match="tls_cert_file=") as refused:
        tls_context(certificate, key)
    assert message in str(refused.value) and "tls_key_file=" in str(refused.value)


def test_without_a_certificate_there_is_no_tls():
    assert tls_context(None, None) is None
