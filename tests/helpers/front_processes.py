"""Real processes of fronts over a model of fake engines, which is in a thread of this process."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from pdjax.async_llm import AsyncLLM
from pdjax.serving.async_backend import AsyncBackend
from pdjax.serving.front import Settings
from pdjax.serving.processes.fronts import Fronts
from pdjax.serving.server import listening_socket, url_of
from tests.helpers.text_llm import TextLLM

PATIENCE = 90.0
"""Seconds in which processes start; those of other tests may have the cores."""


class FrontedServer:
    """A server whose HTTP is in processes.

    Attributes:
      url: of its root.
      llm, fronts: the latter belong to the event loop `loop`.
      error: what has ended it, if anything has.
    """

    def __init__(self, llm: TextLLM, fronts: Fronts) -> None:
        self.llm, self.fronts = llm, fronts
        self.url, self.error = "", BaseException()
        self.loop: asyncio.AbstractEventLoop

    def call(self, call: Any, *args: Any) -> None:
        """Call it within the event loop."""
        self.loop.call_soon_threadsafe(call, *args)

    def report(self) -> dict[str, Any]:
        """What the fronts ask for."""
        asked = asyncio.run_coroutine_threadsafe(self.fronts._report(), self.loop)
        return asked.result(PATIENCE)


@contextmanager
def fronted(
    llm: TextLLM, count: int = 2, settings: Settings | None = None
) -> Iterator[FrontedServer]:
    """Serve it; `pdjax.async_llm.LLM` has been patched to be it."""
    started = threading.Event()
    with closing(Fronts(count)) as fronts, listening_socket("127.0.0.1", 0) as listening:
        at = FrontedServer(llm, fronts)
        at.url = url_of(listening)

        async def run() -> None:
            at.loop = asyncio.get_running_loop()
            backend = AsyncBackend(AsyncLLM(), "bytes")
            fake: Any = llm
            try:
                await fronts.start(fake, backend, settings or Settings(), log_level="debug")
                started.set()
                await fronts.serve(listening)
            finally:
                await backend.close()

        def in_thread() -> None:
            try:
                asyncio.run(run())
            except BaseException as error:
                at.error = error
                started.set()

        thread = threading.Thread(target=in_thread, daemon=True)
        thread.start()
        assert started.wait(PATIENCE), "the fronts do not start"
        try:
            yield at
        finally:
            if thread.is_alive():
                at.call(fronts.end)
                at.call(fronts.end)
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the server does not end"
