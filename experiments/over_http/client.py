"""A client that sends completions when they are due, whatever has become of those before: an open
loop. It is a process of its own, needs nothing but Python, and prints JSON. As clients of this
field do, it sends a request on a connection that is idle, and opens one where there is none.

  python client.py PORT < LOAD

LOAD is JSON: `arrivals`, seconds after the start; `prompts`, lists of token ids; `max_tokens`. Of
each request it tells the moments of its chunks, in seconds after it began to send it: an event
loop's timer comes up to a millisecond late, which is none of the server's.
"""

import asyncio
import json
import sys
import time
from typing import Any

CHUNK, END, WHOLE = b'data: {"', b"data: [DONE]", b"\r\n0\r\n\r\n"
"""How a chunk begins, what the last one says, and how the body of a response ends."""
LEAD_S = 0.2
"""Seconds before the first arrival."""


def request_of(prompt: list[int], max_tokens: int) -> bytes:
    """A streamed completion, as it goes over the wire."""
    asked = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body = json.dumps({**asked, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"content-type: application/json\r\n\r\n" + body


class Connection(asyncio.Protocol):
    """A connection, on which one response after another comes.

    Args:
      idle: has the connections on which nothing is under way.
    """

    def __init__(self, idle: list["Connection"]) -> None:
        self._idle, self._rest = idle, b""
        self._moments: list[float] = []
        self._ended: asyncio.Future[list[float]] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    async def ask(self, request: bytes) -> list[float]:
        """Send a request; the moments of its chunks."""
        self._rest, self._moments = b"", []
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._ended

    def data_received(self, data: bytes) -> None:
        now, data = time.perf_counter(), self._rest + data
        found = data.count(CHUNK)
        self._moments += [now] * found
        at = data.rfind(CHUNK) + 1 if found else 0  # a chunk that was counted is not counted again
        self._rest = data[max(at, len(data) - 64) :]
        if END in self._rest and self._rest.endswith(WHOLE):
            assert self._ended is not None, "a response to nothing"
            self._idle.append(self)
            self._ended.set_result(self._moments)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._idle:
            self._idle.remove(self)
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(exc or ConnectionError("the answer was cut off"))


async def ask(port: int, idle: list[Connection], due: float, request: bytes) -> list[float]:
    """Send a request when it is due; the moments of its chunks after that."""
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    began = time.perf_counter()
    if idle:
        connection = idle.pop()
    else:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(idle), "127.0.0.1", port)
    return [moment - began for moment in await connection.ask(request)]


async def main(port: int, load: dict[str, Any]) -> list[list[float]]:
    """Send all of a load."""
    requests = [request_of(prompt, load["max_tokens"]) for prompt in load["prompts"]]
    began = time.perf_counter() + LEAD_S
    dues = [began + arrival for arrival in load["arrivals"]]
    idle: list[Connection] = []
    asked = (ask(port, idle, *each) for each in zip(dues, requests, strict=True))
    return await asyncio.gather(*asked)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(int(sys.argv[1]), json.load(sys.stdin)))))
