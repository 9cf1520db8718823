"""The metrics of one sequence, worked out from the marks of its life and the moments of its tokens.

What each key of `RequestMetrics.to_json` means is said in `definitions.py`.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from pdjax.host.handoff.accounting import TransferTotals

MARKS = {
    "arrived": "queue",
    "prefill_started": "prefill",
    "first_token": None,
    "prefilled": "wait for row",
    "reserved": None,
    "transfer_started": "transfer",
    "sent": None,
    "transfer_landed": "wait for tick",
    "decoding": "wait for tick",
    "first_tick": "decode",
    "preempted": "queue",
    "finished": "",
}
"""Moments of a sequence's life, and the phase that begins with each; None begins no other phase, ""
ends the last one. All but the first and the last may come again, after a preemption or when the
sequence moves to another decode engine.

* prefill_started: its first chunk is dispatched.
* prefilled: the last chunk has come back, and it does not stay on the prefill engine.
* reserved: a decode row and pages are held for it; before `prefilled` where KV leaves ahead.
* sent: the first shipment of a hand-off leaves.
* transfer_started: it waits for nothing but its KV.
* transfer_landed: its KV is in the decode pool, or the write is dispatched there.
* decoding: it has its row; first_tick: the first tick with it is dispatched.
"""

PHASES = ("queue", "prefill", "wait for row", "transfer", "wait for tick", "decode")
"""What a sequence does, in the order of a life without preemption."""


class Phase(NamedTuple):
    """What a sequence did from `start` to `end`, seconds; the name is of `PHASES`."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class RequestMetrics:
    """Moments of one sequence, in seconds on the run's clock, and what follows from them.

    Attributes:
      id: of the sequence. arrival: moment of arrival.
      marks: (name, moment), in order; names are of `MARKS`.
      token_times: moment of each output token; in an array, which takes 8 bytes for each.
      prompt_tokens, cached_tokens: length of the prompt, and how much of it had its KV reused.
      transfer: its hand-offs.
      finish_reason: as in `Completion`, or "shed" of one that was refused for want of room; None
        while it runs.
      local: whether it was prefilled first on an engine that decodes, too; None before, and where
        that is not known.
    """

    id: str
    arrival: float
    marks: tuple[tuple[str, float], ...]
    token_times: Seq[float]
    prompt_tokens: int
    cached_tokens: int
    transfer: TransferTotals
    finish_reason: str | None
    local: bool | None = None

    @property
    def output_tokens(self) -> int:
        """Tokens generated."""
        return len(self.token_times)

    @property
    def preemptions(self) -> int:
        """Times that its KV was given up, to be computed again."""
        return sum(name == "preempted" for name, _ in self.marks)

    def since_arrival(self, mark: str) -> float | None:
        """Seconds from arrival to the first mark of a name; None if there is none."""
        moment = next((moment for name, moment in self.marks if name == mark), None)
        return None if moment is None else moment - self.arrival

    @property
    def queue(self) -> float | None:
        """Seconds from arrival to the dispatch of its first prefill chunk."""
        return self.since_arrival("prefill_started")

    @property
    def prefill(self) -> float | None:
        """Seconds from there to the first token: `queue + prefill` is `ttft`."""
        return None if self.ttft is None or self.queue is None else self.ttft - self.queue

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds from arrival."""
        return self.token_times[0] - self.arrival if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first, seconds; None for fewer than two tokens."""
        gaps = self.output_tokens - 1
        return (self.token_times[-1] - self.token_times[0]) / gaps if gaps > 0 else None

    @property
    def itl(self) -> tuple[float, ...]:
        """Inter-token latencies: each gap, seconds."""
        return tuple(later - earlier for earlier, later in pairwise(self.token_times))

    @property
    def e2e(self) -> float | None:
        """End-to-end latency: seconds from arrival to the last token."""
        return self.token_times[-1] - self.arrival if self.token_times else None

    @property
    def first_gap(self) -> "FirstGap | None":
        """What the time between the first token and the second one went on; None for fewer than
        two tokens."""
        if self.output_tokens < 2:
            return None
        first, second = self.token_times[0], self.token_times[1]
        spent = dict.fromkeys(PHASES, 0.0)
        for name, start, end in phases(self):
            if start >= second:
                break
            spent[name] += max(0.0, min(end, second) - max(start, first))
        waits = spent["wait for row"], spent["transfer"], spent["wait for tick"]
        return FirstGap(*waits, second - first - sum(waits))

    @property
    def failed(self) -> bool:
        """Whether it ended in an error."""
        return self.finish_reason == "error"

    @property
    def shed(self) -> bool:
        """Whether it was refused for want of room, before anything was done for it."""
        return self.finish_reason == "shed"

    @property
    def completed(self) -> bool:
        """Whether it ran to its proper end, neither aborted nor failed."""
        return self.finish_reason in ("stop", "length")

    def to_json(self) -> dict[str, Any]:
        """Plain values under the keys of `definitions.REQUEST`; latencies in milliseconds."""
        gap = self.first_gap or FirstGap(None, None, None, None)
        return {
            "id": self.id,
            "finish_reason": self.finish_reason,
            "arrival_s": self.arrival,
            "input_len": self.prompt_tokens,
            "cached_len": self.cached_tokens,
            "output_len": self.output_tokens,
            "prefilled_locally": self.local,
            "queue_ms": in_ms(self.queue),
            "prefill_ms": in_ms(self.prefill),
            "ttft_ms": in_ms(self.ttft),
            "row_wait_ms": in_ms(gap.row_wait),
            "kv_wait_ms": in_ms(gap.kv_wait),
            "tick_wait_ms": in_ms(gap.tick_wait),
            "first_tick_ms": in_ms(gap.first_tick),
            "tpot_ms": in_ms(self.tpot),
            "e2el_ms": in_ms(self.e2e),
            "itls_ms": [in_ms(gap) for gap in self.itl],
            "reserved_ms": in_ms(self.since_arrival("reserved")),
            "sent_ms": in_ms(self.since_arrival("sent")),
            "written_ms": in_ms(self.since_arrival("transfer_landed")),
            "preemptions": self.preemptions,
            "transfer": self.transfer.to_json(),
        }


class FirstGap(NamedTuple):
    """The seconds between the first token and the second one; they add up to that gap.

    Attributes:
      row_wait: until a decode row and pages were reserved.
      kv_wait: from there until the KV was in the decode pool.
      tick_wait: from there to the dispatch of the first tick.
      first_tick: the rest: the tick, or whatever else made the second token.
    """

    row_wait: float | None
    kv_wait: float | None
    tick_wait: float | None
    first_tick: float | None


def phases(metrics: RequestMetrics) -> list[Phase]:
    """What a sequence did, without gaps, from its arrival to its end, or to its last mark or token
    where it has not ended."""
    done: list[Phase] = []
    phase, since = "", metrics.arrival
    for name, moment in metrics.marks:
        after = MARKS[name]
        if after is not None and after != phase:
            if phase and moment > since:
                done.append(Phase(phase, since, moment))
            phase, since = after, moment
    last = metrics.token_times[-1] if metrics.token_times else since
    if phase and last > since:
        done.append(Phase(phase, since, last))
    return done


def in_ms(seconds: float | None) -> float | None:
    """Seconds as milliseconds."""
    return None if seconds is None else seconds * 1e3
