"""Servers that a study starts and ends: pdjax's own over HTTP, and other programs."""

import asyncio
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection, HTTPException

from experiments.bench_fronts.ways import serving
from pdjax.async_llm import AsyncLLM
from pdjax.bench.results import Chips
from pdjax.bench.system import System, server_system
from pdjax.config import Config

PORT = "{port}"
"""Stands for the port in a command."""


@contextmanager
def pdjax_over_http(config: Config, fronts: int) -> Iterator[System]:
    """A config's engines behind pdjax's server, driven by the client that drives other servers.

    Args:
      fronts: processes of HTTP; 0 is the engines' own.
    """
    llm = AsyncLLM(config)
    try:
        with serving(llm, fronts) as port:
            vocab_size = llm.llm.spec.vocab_size
            system = server_system(f"http://127.0.0.1:{port}", vocab_size=vocab_size)
            yield replace(system, chips=Chips.of(llm.llm.config), config=llm.llm.config)
    finally:
        asyncio.run(llm.close())


@contextmanager
def program(
    command: str, *, vocab_size: int, chips: int | None = None, start_s: float = 600.0
) -> Iterator[System]:
    """A server of another program, started and ended.

    Args:
      command: of which `{port}` is replaced by a free port.
      vocab_size, chips: as in `server_system`.
      start_s: seconds that it may take until it names its model.

    Raises:
      ValueError: a command without a port, or it has ended or named no model within the time.
      OSError: no such program.
    """
    if PORT not in command:
        raise ValueError(f"command={command!r}: must have {PORT} where the port goes")
    port = _free_port()
    process = subprocess.Popen(shlex.split(command.replace(PORT, str(port))))
    try:
        _await_models(process, command, port, time.monotonic() + start_s)
        yield server_system(f"http://127.0.0.1:{port}", vocab_size=vocab_size, chips=chips)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_models(
    process: "subprocess.Popen[bytes]", command: str, port: int, until: float
) -> None:
    while time.monotonic() < until:
        if (code := process.poll()) is not None:
            raise ValueError(f"command={command!r}: has ended with status {code}")
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/v1/models")
            if connection.getresponse().status == 200:
                return
        except (OSError, HTTPException):
            time.sleep(0.2)  # it does not listen yet
        finally:
            connection.close()
    raise ValueError(f"command={command!r}: has named no model in time")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
