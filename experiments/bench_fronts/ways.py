"""The ways that tokens take from the session to a reader, and what is measured of them."""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from pdjax.async_llm import AsyncLLM
from pdjax.core.request import SamplingParams
from pdjax.llm import LLM
from pdjax.serving.async_backend import AsyncBackend
from pdjax.serving.front import Front, Settings
from pdjax.serving.processes.fronts import Fronts
from pdjax.serving.server import Server, listening_socket

HERE = Path(__file__).parent
PROMPT = tuple([97] * 8)


def clients(what: str, port: int, *numbers: int, count: int = 1) -> list[dict[str, Any]]:
    """What client processes have measured, one or several at once."""
    command = [sys.executable, str(HERE / "client.py"), what, str(port), *map(str, numbers)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise ValueError(f"{' '.join(command)}: failed")
    return [json.loads(output) for output in outputs]


def streamed(port: int, streams: int, tokens: int, readers: int) -> dict[str, float]:
    """Chunks and tokens a second of streams at once, over client processes; and their first."""
    found = clients("streams", port, streams // readers, tokens, count=readers)
    seconds = max(each["seconds"] for each in found)
    chunks = sum(each["chunks"] for each in found)
    firsts = [first for each in found for first in each["first_s"]]
    return {
        "chunks": chunks,
        "chunks_per_s": chunks / seconds,
        "tokens_per_s": streams // readers * readers * tokens / seconds,
        "tokens_per_chunk": streams // readers * readers * tokens / chunks,
        "first_ms": statistics.median(firsts) * 1e3,
    }


def processes_of(port: int) -> list[int]:
    """The processes of the fronts; none where HTTP has none of its own."""
    with urlopen(f"http://127.0.0.1:{port}/engines") as answer:
        return [front["pid"] for front in json.load(answer).get("fronts", {}).values()]


def cpu_seconds(pids: list[int]) -> float:
    """Seconds of a core that processes have had; of this one where there are none."""
    if not pids:
        return time.process_time()
    spent = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        spent += int(fields[11]) + int(fields[12])  # of the user, of the system
    return spent / os.sysconf("SC_CLK_TCK")


class Direct:
    """The session without HTTP."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def _submit(self, tokens: int, heard: Any) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        request = self._llm.requests.of_prompt(PROMPT, params, {}).request
        self._llm.session.submit(request, on_event=heard)

    def streams(self, streams: int, tokens: int) -> dict[str, float]:
        """Tokens a second of requests at once."""
        moments, left, end = list[float](), [streams], threading.Event()

        def hear(event: Any) -> None:
            moments.append(time.perf_counter())
            if event.output is not None:
                left[0] -= 1
                if not left[0]:
                    end.set()

        for _ in range(streams):
            self._submit(tokens, hear)
        end.wait()
        return {"tokens_per_s": streams * tokens / (moments[-1] - moments[0])}

    def first_s(self, count: int) -> list[float]:
        """Seconds to the first token of requests, one after another."""
        seconds = []
        for _ in range(count):
            heard, began = threading.Event(), time.perf_counter()
            moments = list[float]()

            def hear(event: Any, moments: Any = moments, heard: Any = heard) -> None:
                moments.append(time.perf_counter())
                heard.set()

            self._submit(1, hear)
            heard.wait()
            seconds.append(moments[0] - began)
        return seconds


@contextmanager
def serving(llm: AsyncLLM, count: int) -> Iterator[int]:
    """Serve HTTP in so many processes, or in this one; the port.

    Raises:
      ValueError: the server has not started.
    """
    listening, started = listening_socket("127.0.0.1", 0), threading.Event()
    port, ends = listening.getsockname()[1], list[Any]()
    failures = list[BaseException]()

    async def here() -> None:
        server = Server(Front(_Kept(llm, "bytes"), Settings()))
        ends.append(lambda: server.handle_exit(15, None))
        serving = asyncio.ensure_future(server.serve([listening]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        started.set()
        await serving

    async def apart(fronts: Fronts) -> None:
        ends.append(fronts.end)
        backend = _Kept(llm, "bytes")
        await fronts.start(llm.llm, backend, Settings(), log_level="warning")
        started.set()
        await fronts.serve(listening)

    def run_loop() -> None:
        try:
            if count == 0:
                asyncio.run(here())
            else:
                with closing(Fronts(count)) as fronts:
                    asyncio.run(apart(fronts))
        except BaseException as error:
            failures.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=run_loop)
    thread.start()
    started.wait()
    if failures:
        raise ValueError(f"the server has not started: {failures[0]}") from failures[0]
    try:
        yield port
    finally:
        ends[0]()
        thread.join()
        listening.close()


class _Kept(AsyncBackend):
    """A backend whose LLM outlives its server."""

    async def close(self) -> None:
        """Nothing ends here."""


def ceiling(processes: int, streams: int, tokens: int, readers: int) -> dict[str, float]:
    """The same bytes from bare servers, the connections dealt to them by the kernel."""
    command = [sys.executable, str(HERE / "ceiling.py"), str(tokens)]
    how: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running, port = list[Any](), ""
    for _ in range(processes):
        process = subprocess.Popen([*command, *filter(None, [port])], **how)
        running.append(process)
        assert process.stdout is not None, "a pipe was asked for"
        port = process.stdout.readline().strip()
    try:
        return streamed(int(port), streams, tokens, readers)
    finally:
        for process in running:
            process.communicate()
