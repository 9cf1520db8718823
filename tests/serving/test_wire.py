"""What comes over a socket and is no tidy request: each has its answer or a closed connection, and
the server goes on. Bodies are in test_bodies.py, clients that leave in test_storm.py."""

import re
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.helpers.fake_backend import PATIENCE, FakeBackend, Served, served

BODY = b'{"prompt":"x","max_tokens":2}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    backend = FakeBackend(tmp_path_factory.mktemp("fake"))
    with served(lambda: backend) as at:
        yield at


def connected(at: Served) -> socket.socket:
    target = urlsplit(at.url)
    return socket.create_connection((target.hostname, target.port), PATIENCE)


def post(body: bytes = BODY, more: bytes = b"") -> bytes:
    return HEAD + more + b"content-length: %d\r\n\r\n" % len(body) + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def told(client: socket.socket, until: bytes | None = None) -> bytes:
    """What comes until the connection is closed, or until these bytes."""
    found = b""
    while until is None or until not in found:
        try:
            more = client.recv(65536)
        except ConnectionResetError:
            break
        if not more:
            break
        found += more
    return found


def statuses(answer: bytes) -> list[int]:
    return [int(each) for each in re.findall(rb"HTTP/1\.1 (\d+)", answer)]


LAST = GET + b"connection: close\r\n\r\n"
"""A request after which the server closes: that it is answered says that the connection went on."""


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (post() * 3, [200, 200, 200]),
        (post(b'{"prompt":"x","max_tokens":2,"stream":true}') + post(), [200, 200]),
        (post(more=b"expect: 100-continue\r\n"), [100, 200]),
        (CHUNKED + chunk(BODY) + b"0\r\n\r\n", [200]),
        (CHUNKED + b"".join(map(chunk, (BODY[:1], BODY[1:]))) + b"0\r\nx-last: 1\r\n\r\n", [200]),
        (post(b"\xef\xbb\xbf" + BODY), [200]),
        (post(BODY.decode().encode("utf-16")), [200]),
        (post(b'{"prompt":5,"prompt":"x"}'), [200]),
        (post(b'{"prompt":"x","prompt":5}'), [400]),
        (post(b'{"prompt":"x","seed":' + b"9" * 5000 + b"}"), [400]),
        (post(b'{"prompt":"x","any":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), [400]),
        (post(b'{"prompt":"x","any":' + b"[" * 500 + b"]" * 500 + b"}"), [200]),
        (post(b'{"prompt":"x","temperature":1e999}'), [400]),
        (post(b'{"prompt":"x","user":"\\ud800"}'), [200]),
        (post(b'{"prompt":"x","\\ud800":1}'), [400]),
        (post(b'{"prompt":"a\\u0000b"}'), [200]),
        (post(b'{"prompt":"a\0b"}'), [400]),
        (post(b"null") + post(b"[]") + post(BODY + b"x"), [400, 400, 400]),
        (post().replace(b"application/json", b"text/plain"), [415]),
        (post().replace(b"content-type: application/json\r\n", b""), [415]),
        (GET + b"content-length: 5\r\n\r\nhello", [200]),
        (b"GET /v1/models/a%00b%ff HTTP/1.1\r\nhost: x\r\n\r\n", [404]),
        (b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n", [404]),
        (b"TRACE /health HTTP/1.1\r\nhost: x\r\n\r\n", [405]),
    ],
)
def test_it_is_answered_and_the_connection_goes_on(at: Served, sent: bytes, expected: list[int]):
    with connected(at) as client:
        client.sendall(sent + LAST)
        assert statuses(told(client)) == [*expected, 200]


@pytest.mark.parametrize(
    "sent",
    [
        CHUNKED + b"zz\r\n",
        CHUNKED + b"-5\r\nabc\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n12345",
        HEAD + b"content-length: -5\r\n\r\n",
        HEAD + b"content-length: five\r\n\r\n",
        HEAD + b"content-length: " + b"9" * 30 + b"\r\n\r\n",
        HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        GET + b"x: " + b"y" * 200_000,
        GET + b"x: a\0b\r\n\r\n",
        GET + b"x : y\r\n\r\n",
        b"GET /hea\0lth HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_request_ends_the_connection(at: Served, sent: bytes):
    with connected(at) as client:
        client.sendall(sent)
        assert statuses(told(client))[-1:] in ([400], [])


def test_a_body_that_is_too_long_is_refused_before_it_comes(at: Served):
    with connected(at) as client:
        client.sendall(HEAD + b"expect: 100-continue\r\ncontent-length: 99999999999\r\n\r\n")
        assert statuses(told(client, b"request_too_large")) == [413]


def test_a_body_may_come_a_byte_at_a_time(at: Served):
    with connected(at) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in post():
            client.sendall(bytes([byte]))
        assert statuses(told(client, b"usage")) == [200]


@pytest.fixture(autouse=True)
def goes_on(at: Served) -> Iterator[None]:
    yield
    with connected(at) as client:
        client.sendall(LAST)
        assert statuses(told(client)) == [200]
    at.until(lambda: not at.front.requests and not at.front.answers)
