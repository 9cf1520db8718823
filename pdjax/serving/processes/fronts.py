"""The fronts of a server: they are started, dealt connections, replaced where one dies or hangs,
ended."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pdjax.llm import LLM
from pdjax.serving.backend import Backend
from pdjax.serving.briefly_kept import BrieflyKept
from pdjax.serving.front import Settings
from pdjax.serving.logs import event
from pdjax.serving.processes.dealer import Dealer
from pdjax.serving.processes.front_link import FrontLink, Methods
from pdjax.serving.processes.front_process import FrontProcess
from pdjax.serving.processes.messages import BEAT_S, Setup
from pdjax.serving.processes.server_folder import ServerFolder
from pdjax.serving.server import LEAVE_S

RESTART_S = 1.0
"""Seconds until a front that has died is started anew."""
MOST_FAILURES = 3
"""Times in a row that a front may end before it is ready; then the server ends."""
KILL_S = 5.0
"""Seconds that a front has beyond its drain before it is killed."""
HURRY_S = 1.0
"""Seconds that it has when it is to end at once."""
LATE_BEATS = 4
"""Times `BEAT_S` without a word, after which a front is dealt no connection until it speaks."""
MOST_BEATS = 20
"""The same until it is taken for hung: it is killed, and another one is started."""
START_BEATS = 240
"""The same for a front that is not ready yet."""


class _Slot:
    """The place of one front.

    Attributes:
      process, link: of the front that is there now; no link before `Fronts.start`, and no process
        until the next one is started.
      is_ready: whether it has said so.
      beats: looks at it since it spoke last. They are counted, not the seconds: where this process
        stands still, it has not looked, either.
      failures: ends since a front was ready here.
      losses: fronts that died or hung here.
    """

    def __init__(self, number: int, process: FrontProcess) -> None:
        self.number, self.failures, self.losses = number, 0, 0
        self.process: FrontProcess | None = process
        self.link: FrontLink | None = None
        self.is_ready, self.beats = False, 0

    @property
    def is_dealt(self) -> bool:
        """Whether the front is to be given connections."""
        return self.process is not None and self.is_ready and self.beats < LATE_BEATS


class Fronts:
    """Made before the model is loaded, so that the processes start meanwhile. All but the
    constructor and `close` belong to one event loop.

    Args:
      count: how many, at least one.

    Attributes:
      folder: for what the processes share; removed by `close`.
    """

    def __init__(self, count: int) -> None:
        self._folder = ServerFolder()
        self.folder = self._folder.path
        (self.folder / "metrics").mkdir()
        self._slots = [_Slot(number, self._process()) for number in range(count)]
        self._dealer: Dealer | None = None
        self._ending: set[asyncio.Task[None]] = set()  # processes
        self._signals = 0
        self._failed = False

    async def start(
        self,
        llm: LLM,
        backend: Backend,
        settings: Settings,
        certificate: str | None = None,
        key: str | None = None,
        log_level: str = "info",
    ) -> None:
        """Tell the fronts what they serve, and wait until they do.

        Args:
          llm: serves the requests; a thread of its session's own drives.
          backend: the same, for questions.
          settings, certificate, key, log_level: as in `Setup`.

        Raises:
          ChildProcessError: a front ends time after time.
        """
        self._loop, self._llm, self._settings = asyncio.get_running_loop(), llm, settings
        self._changed, self._backend = asyncio.Event(), backend
        self._methods: Methods = {
            "report": BrieflyKept(self._report),
            "recent": BrieflyKept(backend.recent),
        }
        tokenizer = None
        if backend.tokenizer is not None:
            tokenizer = str(self.folder / "tokenizer")
            Path(tokenizer).mkdir()
            backend.tokenizer.save(Path(tokenizer))
        parts = (backend.model, settings, certificate, key, tokenizer, log_level)
        self._setup = Setup(0, *parts)
        llm.session.after_turns.append(self._flush)
        for slot in self._slots:
            self._link(slot)
        self._looking = self._loop.call_later(BEAT_S, self._look)
        await self._until(lambda: self._failed or all(slot.is_ready for slot in self._slots))
        self._check()

    async def serve(self, listening: socket.socket) -> None:
        """Deal the connections of a bound socket until a signal. The first one lets answers finish
        within `Settings.drain_s`, the second one ends all at once.

        Raises:
          ChildProcessError: a front ends time after time.
        """
        self._dealer = Dealer(listening)
        for slot in self._slots:
            if slot.process is not None and slot.is_dealt:
                self._dealer.add(slot.process.receiver)
        with self._on_signals():
            await self._until(lambda: self._signals > 0)
            gone = self._until(lambda: not (self._ending or any(s.process for s in self._slots)))
            with suppress(TimeoutError):
                await asyncio.wait_for(gone, self._settings.drain_s + LEAVE_S + KILL_S)
        self._looking.cancel()
        self._dealer.close()
        self._check()

    def end(self) -> None:
        """What a signal does."""
        self._signals += 1
        for slot in self._slots:
            if slot.link is not None:
                slot.link.end()
        if self._signals == 2:
            self._loop.call_later(HURRY_S, self._kill)
        self._changed.set()

    def kill(self, number: int) -> None:
        """End a front at once, as a fault would."""
        process = self._slots[number].process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End what has not ended, and remove the folder."""
        for slot in self._slots:
            if slot.link is not None:
                slot.link.close()
            if slot.process is not None:
                slot.process.end()
                slot.process.receiver.close()
        with suppress(AttributeError, ValueError):  # it was never started
            self._llm.session.after_turns.remove(self._flush)
        self._folder.close()

    # What happens to a front.

    def _process(self) -> FrontProcess:
        return FrontProcess(self.folder / "metrics")

    def _link(self, slot: _Slot) -> None:
        assert slot.process is not None, "a process to be linked"
        slot.link = FrontLink(
            slot.process.messages,
            self._llm,
            self._methods,
            self._setup._replace(number=slot.number),
            lambda: self._front_ready(slot),
            lambda ended: self._front_alive(slot, ended),
            lambda: self._front_lost(slot),
        )
        slot.beats = 0

    def _front_ready(self, slot: _Slot) -> None:
        slot.is_ready, slot.failures, slot.beats = True, 0, 0
        if self._dealer is not None and slot.process is not None:
            self._dealer.add(slot.process.receiver)
            event("front_restarted", front=slot.number, pid=slot.process.pid)
        self._changed.set()

    def _front_alive(self, slot: _Slot, ended: int) -> None:
        assert slot.process is not None, "a front that was there"
        slot.process.receiver.ended, was_dealt, slot.beats = ended, slot.is_dealt, 0
        if self._dealer is not None and not was_dealt:
            self._dealer.add(slot.process.receiver)

    def _look(self) -> None:
        """Each `BEAT_S`: deal nothing to a front that is late, and replace one that hangs."""
        self._looking = self._loop.call_later(BEAT_S, self._look)
        for slot in self._slots:
            if slot.process is None or slot.link is None:
                continue
            was_dealt, slot.beats = slot.is_dealt, slot.beats + 1
            if self._dealer is not None and was_dealt and not slot.is_dealt:
                self._dealer.remove(slot.process.receiver)
            if slot.beats >= (MOST_BEATS if slot.is_ready else START_BEATS):
                told = {"front": slot.number, "pid": slot.process.pid}
                event("front_hangs", logging.ERROR, **told, silent_s=slot.beats * BEAT_S)
                slot.process.kill()
                slot.link.lose()

    def _front_lost(self, slot: _Slot) -> None:
        process, slot.process, slot.is_ready = slot.process, None, False
        assert process is not None and slot.link is not None, "a front that was there"
        if self._dealer is not None:
            self._dealer.remove(process.receiver)
        ending = asyncio.ensure_future(self._end(slot, process, len(slot.link.open)))
        self._ending.add(ending)
        ending.add_done_callback(self._ended)

    async def _end(self, slot: _Slot, process: FrontProcess, open_answers: int) -> None:
        """Wait until the process of a front that is gone has ended; then have another one."""
        status = await asyncio.to_thread(process.end)
        if self._dealer is None or self._signals:
            process.receiver.close()
        else:
            self._dealer.end(process.receiver)
        if self._signals:
            return
        slot.losses, slot.failures = slot.losses + 1, slot.failures + 1
        told = {"front": slot.number, "pid": process.pid, "status": status}
        event("front_died", logging.ERROR, **told, aborted_answers=open_answers)
        self._failed = slot.failures >= MOST_FAILURES
        if self._failed:
            self.end()
        else:
            self._loop.call_later(RESTART_S, self._restart, slot)

    def _ended(self, ending: asyncio.Task[None]) -> None:
        self._ending.discard(ending)
        self._changed.set()

    def _restart(self, slot: _Slot) -> None:
        if self._signals:
            return
        try:
            slot.process = self._process()
        except OSError as error:  # no room for another process or file; there may be later
            event("front_not_started", logging.ERROR, front=slot.number, reason=str(error))
            self._loop.call_later(RESTART_S, self._restart, slot)
        else:
            self._link(slot)

    def _kill(self) -> None:
        for slot in self._slots:
            self.kill(slot.number)

    # What the event loop does.

    def _flush(self) -> None:
        """After each turn, in the thread that drives it."""
        for slot in self._slots:
            if slot.link is not None:
                slot.link.flush()

    async def _report(self) -> dict[str, Any]:
        """The backend's report, with the state of each front."""
        fronts = {
            str(slot.number): {
                "pid": None if slot.process is None else slot.process.pid,
                "is_ready": slot.is_dealt,
                "connections": 0 if slot.process is None else slot.process.receiver.open,
                "open_answers": 0 if slot.link is None else len(slot.link.open),
                "losses": slot.losses,
            }
            for slot in self._slots
        }
        answers = sum(front["open_answers"] or 0 for front in fronts.values())
        return {**await self._backend.report(), "fronts": fronts, "open_answers": answers}

    async def _until(self, condition: Any) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _check(self) -> None:
        if self._failed:
            raise ChildProcessError(
                f"a front ended {MOST_FAILURES} times before it was ready; the log says why"
            )

    @contextmanager
    def _on_signals(self) -> Iterator[None]:
        """Let signals end the server; they come to the main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        known = (signal.SIGINT, signal.SIGTERM)
        for each in known:
            self._loop.add_signal_handler(each, self.end)
        try:
            yield
        finally:
            for each in known:
                self._loop.remove_signal_handler(each)
