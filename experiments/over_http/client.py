"""A client that sends completions when they are due, whatever has become of those before: an open
loop. It is a process of its own, and prints JSON. Its HTTP is that of `pdjax bench`.

  python -m experiments.over_http.client PORT < LOAD

LOAD is JSON: `arrivals`, seconds after the start; `prompts`, lists of token ids; `max_tokens`. Of
each request it tells the moments of its chunks, in seconds after it began to send it: an event
loop's timer comes up to a millisecond late, which is none of the server's.
"""

import asyncio
import json
import sys
import time
from typing import Any

from pdjax.bench.http import HttpClient

CHUNK = b'data: {"'
"""How a chunk of an answer begins."""
LEAD_S = 0.2
"""Seconds before the first arrival."""


async def ask(client: HttpClient, due: float, request: bytes) -> list[float]:
    """Send a request when it is due; the moments of its chunks after that."""
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    exchange = await client.ask(request)
    sent, answer = exchange.sent, exchange.answer
    assert sent is not None
    if answer.status != 200:
        raise ValueError(f"HTTP {answer.status}: {answer.body.decode(errors='replace')}")
    return [moment - sent for moment, part in answer.parts for _ in range(part.count(CHUNK))]


async def main(port: int, load: dict[str, Any]) -> list[list[float]]:
    """Send all of a load."""
    client = HttpClient(f"http://127.0.0.1:{port}", time.perf_counter)
    shared = {"max_tokens": load["max_tokens"], "temperature": 0, "ignore_eos": True}
    bodies = [{"prompt": prompt, **shared, "stream": True} for prompt in load["prompts"]]
    requests = [
        client.request("POST", "/v1/completions", json.dumps(body).encode()) for body in bodies
    ]
    began = time.perf_counter() + LEAD_S
    dues = [began + arrival for arrival in load["arrivals"]]
    asked = (ask(client, *each) for each in zip(dues, requests, strict=True))
    found = await asyncio.gather(*asked)
    await client.close()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(int(sys.argv[1]), json.load(sys.stdin)))))
