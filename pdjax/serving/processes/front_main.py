"""A front's process: `python -m pdjax.serving.processes.front_main MESSAGES CONNECTIONS`, two
inherited sockets by their numbers. It never imports JAX.

SIGINT and SIGTERM often reach all processes of a group; the engines' process alone acts on them,
and says when to end. A front whose engines' process has gone ends at once.
"""

import asyncio
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from pdjax.serving import logs
from pdjax.serving.front import Front
from pdjax.serving.processes.frames import Frames
from pdjax.serving.processes.front_server import FrontServer
from pdjax.serving.processes.messages import BEAT_S, Alive, End, Ready, Setup
from pdjax.serving.processes.remote_backend import RemoteBackend
from pdjax.serving.tls import tls_context
from pdjax.text.tokenizer import Tokenizer

ENDED_S = 0.05
"""Seconds within which the engines' process is told of connections that have ended."""


async def serve(messages: socket.socket, channel: socket.socket) -> None:
    """Serve until the engines' process says so, or has gone."""
    setups: asyncio.Future[Setup] = asyncio.get_running_loop().create_future()
    backend: RemoteBackend | None = None
    server: FrontServer | None = None

    def received(message: Any) -> None:
        if isinstance(message, Setup):
            setups.set_result(message)
        elif isinstance(message, End):
            if server is None:
                setups.cancel()
            else:
                server.handle_exit(signal.SIGTERM, None)
        elif backend is not None:
            backend.received(message)

    def lost() -> None:
        setups.cancel()
        if backend is not None:
            backend.lost()
        if server is not None:
            server.should_exit = server.force_exit = True

    frames = Frames(messages, received, lost)
    setup = await setups
    logs.set_up(setup.log_level, shared=True, front=setup.number)
    tokenizer = None if setup.tokenizer is None else Tokenizer.open(Path(setup.tokenizer))
    backend = RemoteBackend(setup.model, tokenizer, frames.send)
    tls = tls_context(setup.certificate, setup.key)
    server = FrontServer(Front(backend, setup.settings), tls, channel)
    serving = asyncio.ensure_future(server.serve())
    while not (server.started or serving.done()):
        await asyncio.sleep(0.005)
    frames.send(Ready())
    beating = asyncio.ensure_future(_beat(frames, server))
    await serving
    beating.cancel()
    frames.close()


async def _beat(frames: Frames, server: FrontServer) -> None:
    """Tell the engines' process each `BEAT_S` that this one goes on, and soon that connections have
    ended; nothing while it reads nothing."""
    loop = asyncio.get_running_loop()
    ended, next_beat = 0, loop.time()
    while True:
        if (server.ended != ended or loop.time() >= next_beat) and not frames.unsent:
            ended, next_beat = server.ended, loop.time() + BEAT_S
            frames.send(Alive(ended))
        await asyncio.sleep(ENDED_S)


def main() -> None:
    """Run a front."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    messages, channel = (socket.socket(fileno=int(word)) for word in sys.argv[1:])
    try:
        asyncio.run(serve(messages, channel))
    except asyncio.CancelledError:  # told to end before it was told what to serve
        logging.shutdown()


if __name__ == "__main__":
    main()
