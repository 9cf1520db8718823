"""A client of completions over plain sockets, for a process of its own; prints JSON. It needs
nothing but Python, and takes little of a core: load generators in Python take more than the server.

  python client.py streams PORT COUNT TOKENS    COUNT streams at once
  python client.py firsts PORT COUNT            the first token of COUNT requests, one after another
"""

import json
import selectors
import socket
import sys
import time
from typing import Any

CHUNK, END = b"data: {", b"data: [DONE]"
LAST = b"0\r\n\r\n"
"""What ends a response."""
PATIENCE_S = 120.0


def request_of(tokens: int) -> bytes:
    """A streamed completion of so many tokens."""
    asked = {"prompt": [97] * 8, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body = json.dumps({**asked, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"content-type: application/json\r\n\r\n" + body


def connected(port: int) -> socket.socket:
    """A connection to the server."""
    found = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


class Stream:
    """A response as it comes.

    Attributes:
      chunks: that have come. first, last: moments of the first and the newest one.
      ended: whether it is whole.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.chunks, self.first, self.last = 0, 0.0, 0.0
        self.ended = False
        self._rest = b""

    def read(self) -> None:
        """Take what has come.

        Raises:
          ConnectionError: the server has hung up.
        """
        data = self.connection.recv(1 << 16)
        if not data:
            raise ConnectionError("the server has hung up")
        data = self._rest + data
        new = data.count(CHUNK)
        if new:
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self.chunks += new
        self.ended = END in data and data.endswith(LAST)
        # A chunk that was counted is not counted again; one that is cut is.
        counted = data.rfind(CHUNK) + 1 if new else 0
        self._rest = data[max(counted, len(data) - 64) :]


def streams(port: int, count: int, tokens: int) -> dict[str, Any]:
    """Answer times of `count` streams at once."""
    asked, waiting = request_of(tokens), selectors.DefaultSelector()
    found = [Stream(connected(port)) for _ in range(count)]
    for stream in found:
        waiting.register(stream.connection, selectors.EVENT_READ, stream)
    began = time.perf_counter()
    for stream in found:
        stream.connection.sendall(asked)
    left = count
    while left:
        ready = waiting.select(PATIENCE_S)
        if not ready:
            raise TimeoutError(f"nothing has come for {PATIENCE_S} s")
        for key, _ in ready:
            key.data.read()
            if key.data.ended:
                waiting.unregister(key.fileobj)
                left -= 1
    for stream in found:
        stream.connection.close()
    return {
        "chunks": sum(stream.chunks for stream in found),
        "seconds": max(stream.last for stream in found) - min(stream.first for stream in found),
        "first_s": [stream.first - began for stream in found],
    }


def firsts(port: int, count: int) -> dict[str, Any]:
    """Seconds to the first token of requests over one connection each of two."""
    asked, connections = request_of(1), [connected(port) for _ in range(2)]
    seconds = []
    for number in range(count):
        stream = Stream(connections[number % 2])
        began = time.perf_counter()
        stream.connection.sendall(asked)
        while not stream.ended:
            stream.read()
        seconds.append(stream.first - began)
    return {"first_s": seconds}


if __name__ == "__main__":
    what, *numbers = sys.argv[1:]
    measure: Any = streams if what == "streams" else firsts
    print(json.dumps(measure(*map(int, numbers))))
