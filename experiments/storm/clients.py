"""Clients of a storm: some read their answers, others leave at any moment, in every way that a
socket has."""

import asyncio
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

SHARES = {
    "stream": 36,
    "whole": 31,
    "leaves before the first token": 9,
    "leaves in mid-stream": 10,
    "half-closes": 6,
    "breaks its body off": 4,
    "never reads": 4,
}
"""Kinds of clients, and how many of a hundred are of each: a third do not take their answer."""
PATIENCE = 120.0
"""Seconds for an answer. A client that has none by then raises TimeoutError."""
DONE = b"data: [DONE]"


@dataclass(frozen=True)
class Target:
    """Where the storm goes.

    Attributes:
      host, port: of the server.
      vocab_size: prompts are random token ids below it.
      prompt, output: most tokens of a prompt and of an answer.
      idle_s: seconds for which a client that never reads stays; its server may cut it off before.
    """

    host: str
    port: int
    vocab_size: int
    prompt: int
    output: int
    idle_s: float = 3.0


async def storm(target: Target, kinds: Seq[str], crowd: int, seed: int) -> Counter[str]:
    """Send a request of each kind, `crowd` of them at once; count what became of them.

    Returns:
      How many clients had which outcome: a status, "left", or "cut off" by the server.
    """
    outcomes: Counter[str] = Counter()
    todo = iter(enumerate(kinds))

    async def some() -> None:
        for number, kind in todo:
            chance = random.Random(f"{seed} {number}")
            outcomes[f"{kind}: {await ask(target, kind, chance)}"] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(crowd):
            group.create_task(some())
    return outcomes


def drawn(count: int, seed: int) -> list[str]:
    """So many kinds, in random order, with each kind's share."""
    return random.Random(seed).choices([*SHARES], [*SHARES.values()], k=count)


async def ask(target: Target, kind: str, chance: random.Random) -> str:
    """Be one client of a kind; what became of it."""
    body = json.dumps(_body(target, kind, chance)).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: storm\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode()
    own = socket.socket()
    if kind == "never reads":
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    own.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(own, (target.host, target.port))
        reader, writer = await asyncio.open_connection(sock=own, limit=2**12)
    except BaseException:
        own.close()
        raise
    try:
        async with asyncio.timeout(PATIENCE):
            if kind == "breaks its body off":
                writer.write(head + body[: chance.randrange(len(body))])
                await writer.drain()
                return "left"
            writer.write(head + body)
            await writer.drain()
            return await _listen(target, kind, reader, writer, chance)
    except (ConnectionError, asyncio.IncompleteReadError):
        return "cut off"
    finally:
        if chance.random() < 0.5:  # the server's next write fails, instead of its next read
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def _body(target: Target, kind: str, chance: random.Random) -> dict[str, Any]:
    ids = [chance.randrange(3, target.vocab_size) for _ in range(chance.randint(1, target.prompt))]
    body = {
        "prompt": ids,
        "max_tokens": chance.randint(1, target.output),
        "ignore_eos": True,
        "temperature": chance.choice([0, 1]),
        "seed": chance.randrange(2**32),
        "stream": kind != "whole",
    }
    if body["temperature"]:
        body["n"] = chance.choice([1, 1, 2])
    if kind == "never reads":
        body |= {"max_tokens": target.output, "logprobs": 5}
    return body


async def _listen(
    target: Target,
    kind: str,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    chance: random.Random,
) -> str:
    """Read as much of the answer as this kind does."""
    if kind == "leaves before the first token":
        await asyncio.sleep(_moment(chance))
        return "left"
    if kind == "never reads":
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(target.idle_s)
        return "left"
    if kind == "half-closes":
        await asyncio.sleep(_moment(chance))
        writer.write_eof()
    head = await reader.readuntil(b"\r\n\r\n")
    status = head.split(b" ", 2)[1].decode()
    if status != "200":
        return status
    if kind == "leaves in mid-stream":
        lines = chance.randint(1, 40)
        while lines and (await reader.readline()).rstrip() != DONE:
            lines -= 1
        return "left"
    if kind == "whole":
        length = next(line for line in head.lower().split(b"\r\n") if b"content-length" in line)
        await reader.readexactly(int(length.split(b":")[1]))
        return status
    while line := await reader.readline():
        if line.rstrip() == DONE:
            return status
    return "cut off"


def _moment(chance: random.Random) -> float:
    """Seconds until a client leaves; half of them leave at once."""
    return chance.choice([0.0, chance.uniform(0, 0.2)])
