"""What a reader does not take is merged, and one that takes nothing is cut off."""

import json
import random
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pdjax.core.outputs import RequestEvent, RequestOutput
from pdjax.serving import protocol
from pdjax.serving.front import Settings
from pdjax.stream import Backlog, Unread
from tests.helpers.fake_backend import PATIENCE, FakeBackend, served


def test_unread_events_are_merged_and_lose_nothing():
    unread, chance = Unread(), random.Random(1)
    backlog = Backlog(unread.popleft)
    sent: dict[int, list[int]] = {0: [], 1: [], 2: []}
    read: dict[int, list[int]] = {0: [], 1: [], 2: []}
    texts = dict.fromkeys(read, "")
    for token in range(5000):
        choice = chance.randrange(3)
        unread.append(RequestEvent("ab", [token, -token], choice=choice))
        sent[choice] += [token, -token]
        if chance.random() < 0.002:
            while event := backlog.pop():
                read[event.choice] += event.token_ids
                texts[event.choice] += event.text
    end = RequestEvent("", [], "stop", RequestOutput("r", None, [1], []), choice=1)
    unread.append(end)
    last = end
    while event := backlog.pop():
        read[event.choice] += event.token_ids
        texts[event.choice] += event.text
        last = event
    assert read == sent and last.output is not None
    assert texts == {choice: "ab" * (len(ids) // 2) for choice, ids in sent.items()}


def test_what_waits_is_a_few_events_however_many_tokens_came():
    unread = Unread()
    for token in range(10_000):
        unread.append(RequestEvent("a", [token]))
    events = []
    try:
        while True:
            events.append(unread.popleft())
    except IndexError:
        pass
    assert len(events) <= 10_000 // 64 + 64
    assert [token for event in events for token in event.token_ids] == [*range(10_000)]


def test_a_client_that_reads_nothing_is_cut_off(tmp_path: Path):
    backend = FakeBackend(tmp_path, "x" * 6000)
    backend.token_s = 0.001
    body = json.dumps(
        {"prompt": "x", "max_tokens": 6000, "stream": True, "logprobs": 20, "n": 2}
    ).encode()
    with served(lambda: backend, Settings(stall_s=0.2), sends=4096) as at:
        target = urlsplit(at.url)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((target.hostname, target.port))
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n" % len(body) + body
            )
            at.until(lambda: backend.answers)
            at.until(lambda: not at.front.requests and not at.front.answers)
            assert backend.answers[0].closed


def test_a_half_closed_socket_and_a_broken_request_hurt_nobody(tmp_path: Path):
    backend = FakeBackend(tmp_path)
    with served(lambda: backend) as at:
        target = urlsplit(at.url)
        for junk in (b"\x16\x03\x01\x00", b"GET /", b"POST /v1/completions HTTP/1.1\r\n\r\n"):
            with socket.create_connection((target.hostname, target.port), PATIENCE) as client:
                client.sendall(junk)
                client.shutdown(socket.SHUT_WR)
                client.recv(1000)
        at.until(lambda: not at.front.requests)
        with socket.create_connection((target.hostname, target.port), PATIENCE) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_a_connection_that_asks_nothing_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol, "HEAD_S", 0.1)
    backend = FakeBackend(tmp_path)
    with served(lambda: backend) as at:
        target = urlsplit(at.url)
        for begun in (b"", b"GET /health HTTP/1.1\r\n"):
            with socket.create_connection((target.hostname, target.port), PATIENCE) as client:
                client.sendall(begun)
                with suppress(ConnectionResetError):
                    assert client.recv(100) == b""
