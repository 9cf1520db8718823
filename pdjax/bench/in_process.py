"""A workload to an LLM of this process: its own thread drives, and this one submits what is due."""

from queue import Empty, SimpleQueue
from typing import Any

from pdjax.bench.record import Played, Record, ended_badly, never_came
from pdjax.core.clock import unix_ns
from pdjax.core.outputs import RequestEvent, RequestOutput
from pdjax.core.request import QueueFull
from pdjax.host.metrics.summary import work_of
from pdjax.llm import LLM
from pdjax.workloads.arrival import Arrival
from pdjax.workloads.schedule import Call, Schedule

LEAD_S = 0.05
"""Seconds before the first arrival."""


def play(llm: LLM, arrivals: list[Arrival], salt: str = "") -> Played:
    """Serve a workload to its end.

    A request arrives when it is due, whatever the engines have to do then, and its clock begins
    there. One that comes after another is due when this thread has heard of that one's end.

    Args:
      llm: serves nothing else meanwhile.
      arrivals: the workload; ids of its requests are those of the answers.
      salt: another salt gives other prompts, of which no prefix cache knows.
    """
    llm.recorder.clear()
    llm.session.start()
    player = _Player(llm, arrivals, salt)
    records = player.play()
    return Played(player.start, player.unix_start_ns, records, work_of(llm.recorder))


class _Player:
    def __init__(self, llm: LLM, arrivals: list[Arrival], salt: str) -> None:
        self._llm = llm
        self.start = llm.clock.now() + LEAD_S
        self.unix_start_ns = unix_ns() + round(LEAD_S * 1e9)
        self._schedule = Schedule(arrivals, llm.spec.vocab_size, salt, start=self.start)
        self._ended = SimpleQueue[tuple[Call, float, RequestOutput]]()
        self._records: dict[int, Record] = {}
        self._sent: dict[int, float] = {}
        # Those that are due soon, with their prompts made.
        self._ready: list[Call] = []

    def play(self) -> list[Record]:
        schedule, clock = self._schedule, self._llm.clock
        try:
            while len(self._records) < schedule.count:
                if not self._ready:
                    self._ready = schedule.take(clock.now() + LEAD_S)[::-1]
                while self._ready and self._ready[-1].moment <= clock.now():
                    self._submit(self._ready.pop())
                self._hear()
        finally:
            self._llm.session.stop()
        return [self._records[number] for number in sorted(self._records)]

    def _submit(self, call: Call) -> None:
        def hear(event: RequestEvent) -> None:
            if event.output is not None:
                self._ended.put((call, now(), event.output))

        now = self._llm.clock.now
        sent = now()
        try:
            self._llm.session.submit(call.request(), on_event=hear, whole=True)
        except QueueFull as error:
            self._refused(call, sent, "shed", error)
        except ValueError as error:
            self._refused(call, sent, "error", error)
        else:
            self._sent[call.number] = sent

    def _hear(self) -> None:
        """Wait for an end, or until the next request is due or to be made ready."""
        now = self._llm.clock.now()
        if self._ready:
            wait: float | None = self._ready[-1].moment - now
        else:
            moment = self._schedule.next_moment
            wait = None if moment is None else moment - LEAD_S - now
        try:
            if wait is not None and wait <= 0:
                call, moment, output = self._ended.get_nowait()
            else:
                call, moment, output = self._ended.get(timeout=wait)
        except Empty:
            return
        self._take(call, moment, output)

    def _take(self, call: Call, moment: float, output: RequestOutput) -> None:
        metrics: Any = output.metrics
        sent = self._sent.pop(call.number)
        self._records[call.number] = Record(call.number, call.arrival, metrics, sent, output.error)
        if metrics.completed:
            self._schedule.ended(call, moment, output.token_ids)
        else:
            self._lose(call, moment)

    def _refused(self, call: Call, sent: float, reason: str, error: Exception) -> None:
        self._records[call.number] = ended_badly(
            call.number, call.arrival, call.moment, sent, reason, str(error)
        )
        self._lose(call, sent)

    def _lose(self, call: Call, moment: float) -> None:
        for record in never_came(self._schedule.broken(call), call, moment):
            self._records[record.number] = record
