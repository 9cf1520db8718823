"""Connections that are dealt to fronts, without processes: to the one with the fewest, past a front
that takes none, and with TLS."""

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pdjax.serving.front import Front, Settings
from pdjax.serving.processes import dealer
from pdjax.serving.processes.dealer import Dealer, Receiver, connections_from
from pdjax.serving.processes.front_server import FrontServer
from pdjax.serving.server import listening_socket
from pdjax.serving.tls import tls_context
from tests.helpers import certificates
from tests.helpers.fake_backend import PATIENCE, FakeBackend


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


class Dealt:
    """The fronts' ends of some socketpairs, and the connections that have come through them."""

    def __init__(self, dealing: Dealer, count: int) -> None:
        self.pairs = [socket.socketpair() for _ in range(count)]
        self.receivers = [Receiver(ours) for ours, _ in self.pairs]
        self.connections: list[list[socket.socket]] = [[] for _ in range(count)]
        for receiver, (_, theirs) in zip(self.receivers, self.pairs, strict=True):
            theirs.setblocking(False)
            dealing.add(receiver)

    def come(self, first: int = 0) -> int:
        """How many have come, of the fronts from the first one on."""
        for (_, theirs), found in [*zip(self.pairs, self.connections, strict=True)][first:]:
            found += connections_from(theirs)
        return sum(map(len, self.connections))

    def close(self) -> None:
        for receiver in self.receivers:
            receiver.close()
        for (_, theirs), found in zip(self.pairs, self.connections, strict=True):
            for each in (theirs, *found):
                each.close()


def test_each_front_is_dealt_the_next_connection():
    async def deal() -> None:
        with listening_socket("127.0.0.1", 0) as listening, ExitStack() as held:

            def connect() -> None:
                held.enter_context(socket.create_connection(listening.getsockname()))

            dealing = Dealer(listening)
            connect()  # waits for a front
            fronts = Dealt(dealing, 3)
            for _ in range(5):
                connect()
            await until(lambda: fronts.come() == 6)
            assert [len(each) for each in fronts.connections] == [2, 2, 2]
            fronts.pairs[0][1].close()  # it has died, and nobody knows yet
            for _ in range(4):
                connect()
            await until(lambda: fronts.come(first=1) == 10)
            dealing.close()
            fronts.close()

    asyncio.run(deal())


def test_the_front_with_the_fewest_open_connections_is_dealt_the_next():
    async def deal() -> None:
        with listening_socket("127.0.0.1", 0) as listening, ExitStack() as held:

            async def connect(count: int, all_in_all: int) -> list[int]:
                for _ in range(count):
                    held.enter_context(socket.create_connection(listening.getsockname()))
                await until(lambda: fronts.come() == all_in_all)
                return [len(each) for each in fronts.connections]

            dealing = Dealer(listening)
            fronts = Dealt(dealing, 3)
            assert await connect(6, 6) == [2, 2, 2]
            fronts.receivers[1].ended = 2
            assert await connect(2, 8) == [2, 4, 2]
            fronts.receivers[2].ended = 1
            dealing.remove(fronts.receivers[2])
            assert await connect(2, 10) == [3, 5, 2]
            dealing.add(fronts.receivers[2])
            assert await connect(2, 12) == [3, 5, 4]
            dealing.close()
            fronts.close()

    asyncio.run(deal())


def test_what_a_front_has_not_taken_when_it_ends_is_dealt_to_the_next():
    async def deal() -> None:
        with listening_socket("127.0.0.1", 0) as listening, ExitStack() as held:

            def connect() -> socket.socket:
                return held.enter_context(socket.create_connection(listening.getsockname()))

            dealing = Dealer(listening)
            fronts = Dealt(dealing, 1)
            [first], [(_, theirs)] = fronts.receivers, fronts.pairs
            taken = connect()
            await until(lambda: fronts.come() == 1)
            left = connect()
            await until(lambda: first.dealt == 2)
            theirs.close()  # it has ended
            late = connect()  # nobody takes it
            dealing.end(first)
            assert first.channel.fileno() == -1 and first.dealt == 1
            others = Dealt(dealing, 1)
            await until(lambda: others.come() == 2)
            [[again, new]] = others.connections
            assert again.getpeername() == left.getsockname()
            assert new.getpeername() == late.getsockname()
            await until(lambda: not others.receivers[0]._sent)  # heard that it holds them
            fronts.close()
            taken.settimeout(PATIENCE)
            assert taken.recv(1) == b""  # nobody else holds what had been taken
            dealing.close()
            others.close()

    asyncio.run(deal())


def test_a_front_tells_how_many_of_its_connections_have_ended(tmp_path: Path):
    async def serve() -> None:
        ours, theirs = socket.socketpair()
        server = FrontServer(Front(FakeBackend(tmp_path), Settings()), None, theirs)
        serving = asyncio.ensure_future(server.serve())
        receiver = Receiver(ours)
        with listening_socket("127.0.0.1", 0) as listening:
            dealing = Dealer(listening)
            dealing.add(receiver)
            clients = [socket.create_connection(listening.getsockname()) for _ in range(3)]
            await until(lambda: len(server.server_state.connections) == 3 and not receiver._sent)
            assert (receiver.dealt, server.ended) == (3, 0)
            for client in clients[:2]:
                client.close()
            await until(lambda: server.ended == 2)
            dealing.close()
        server.handle_exit(15, None)
        await serving
        assert server.ended == 3
        for each in (ours, theirs, clients[2]):
            each.close()

    asyncio.run(serve())


def test_a_front_that_ends_is_dealt_nothing(tmp_path: Path):
    async def deal() -> None:
        with listening_socket("127.0.0.1", 0) as listening:
            dealing = Dealer(listening)
            fronts = Dealt(dealing, 2)
            server = FrontServer(Front(FakeBackend(tmp_path), Settings()), None, fronts.pairs[0][1])
            serving = asyncio.ensure_future(server.serve())
            await until(lambda: server.started)
            server.handle_exit(15, None)
            await serving
            for _ in range(2):
                with socket.create_connection(listening.getsockname()):
                    await asyncio.sleep(0)
            await until(lambda: fronts.come(first=1) == 2)
            dealing.close()
            fronts.close()

    asyncio.run(deal())


def test_where_no_file_can_be_opened_it_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dealer, "AGAIN_S", 0.01)

    class Full:
        """A socket that has room for a connection at the third try."""

        def __init__(self, listening: socket.socket) -> None:
            self._listening, self.tries = listening, 0

        def accept(self) -> Any:
            self.tries += 1
            if self.tries < 3:
                raise OSError(errno.EMFILE, "too many open files")
            return self._listening.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._listening, name)

    async def deal() -> None:
        with listening_socket("127.0.0.1", 0) as listening:
            full: Any = Full(listening)
            dealing = Dealer(full)
            fronts = Dealt(dealing, 1)
            with socket.create_connection(listening.getsockname()):
                await until(lambda: fronts.come() == 1)
            dealing.close()
            fronts.close()
            assert full.tries >= 3

    asyncio.run(deal())


def test_a_front_speaks_tls_and_is_not_hurt_by_who_does_not(tmp_path: Path):
    files = certificates.made_in(tmp_path)
    tls = tls_context(files.certificate, files.key)

    async def ask(port: int) -> bytes:
        trusting = ssl.create_default_context(cafile=files.certificate)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return answer

    async def both() -> None:
        ours, theirs = socket.socketpair()
        server = FrontServer(Front(FakeBackend(tmp_path), Settings()), tls, theirs)
        serving = asyncio.ensure_future(server.serve())
        with listening_socket("127.0.0.1", 0) as listening:
            dealing = Dealer(listening)
            dealing.add(Receiver(ours))
            await until(lambda: server.started)
            with socket.create_connection(listening.getsockname()) as plain:
                plain.sendall(b"GET /health HTTP/1.1\r\n\r\n")
                answer = await asyncio.wait_for(ask(listening.getsockname()[1]), PATIENCE)
            assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"ok\n")
            dealing.close()
        server.handle_exit(15, None)
        await serving
        for each in (ours, theirs):
            each.close()

    asyncio.run(both())
