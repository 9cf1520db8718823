"""A client that sends completions when they are due, whatever has become of those before: an open
loop. It is a process of its own, needs nothing but Python, and prints JSON.

  python client.py PORT < LOAD

LOAD is JSON: `arrivals`, seconds after the start; `prompts`, lists of token ids; `max_tokens`. Of
each request it tells the moments of its chunks, in seconds after the moment at which it was due.
"""

import asyncio
import json
import sys
import time
from typing import Any

CHUNK, END = b'data: {"', b"data: [DONE]"
LEAD_S = 0.2
"""Seconds before the first arrival."""


def request_of(prompt: list[int], max_tokens: int) -> bytes:
    """A streamed completion, as it goes over the wire."""
    asked = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body = json.dumps({**asked, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"content-type: application/json\r\nconnection: close\r\n\r\n" + body


class Answer(asyncio.Protocol):
    """A response as it comes.

    Args:
      request: is sent once there is a connection.

    Attributes:
      moments: of the chunks.
      ended: done once the response is whole.
    """

    def __init__(self, request: bytes) -> None:
        self._request, self._rest = request, b""
        self.moments: list[float] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now, data = time.perf_counter(), self._rest + data
        found = data.count(CHUNK)
        self.moments += [now] * found
        at = data.rfind(CHUNK) + 1 if found else 0  # a chunk that was counted is not counted again
        self._rest = data[max(at, len(data) - 64) :]
        if END in data and not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(exc or ConnectionError("the answer was cut off"))


async def ask(port: int, due: float, request: bytes) -> list[float]:
    """Send a request when it is due; the moments of its chunks after that."""
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    loop = asyncio.get_running_loop()
    transport, answer = await loop.create_connection(lambda: Answer(request), "127.0.0.1", port)
    await answer.ended
    transport.close()
    return [moment - due for moment in answer.moments]


async def main(port: int, load: dict[str, Any]) -> list[list[float]]:
    """Send all of a load."""
    requests = [request_of(prompt, load["max_tokens"]) for prompt in load["prompts"]]
    began = time.perf_counter() + LEAD_S
    dues = [began + arrival for arrival in load["arrivals"]]
    return await asyncio.gather(*map(ask, [port] * len(dues), dues, requests))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(int(sys.argv[1]), json.load(sys.stdin)))))
