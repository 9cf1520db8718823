"""What this host's sockets and asyncio can do at most: a server, for a process of its own, that
answers every request with the same bytes, a chunk a turn of its event loop.

  python ceiling.py TOKENS [PORT]    prints its port, and serves until its input ends

Python's asyncio writes each chunk by itself, as the real server does. Nothing is parsed and nothing
is made: what the real server takes beyond this is its own.
"""

import asyncio
import os
import socket
import sys

CHUNK = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion",'
    b'"created":1700000000,"model":"bytes","choices":[{"index":0,"text":"a","logprobs":null,'
    b'"finish_reason":null,"stop_reason":null}]}\n\n'
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def framed(body: bytes) -> bytes:
    """A piece of a response in chunks."""
    return b"%x\r\n%b\r\n" % (len(body), body)


async def answer(tokens: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer requests of one connection."""
    chunk = framed(CHUNK)
    while await reader.readline():
        length = 0
        while (line := await reader.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            length = int(value) if name == b"content-length" else length
        await reader.readexactly(length)
        writer.write(HEAD)
        for _ in range(tokens):
            writer.write(chunk)
            await asyncio.sleep(0)
        writer.write(framed(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    writer.close()


async def serve(tokens: int, port: int) -> None:
    """Serve until the input ends."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    found.bind(("127.0.0.1", port))

    async def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(tokens, reader, writer)

    server = await asyncio.start_server(begin, sock=found)
    print(found.getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()
    os._exit(0)  # clients may still hold connections


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
