"""What happened, when: the marks of a sequence's life and the spans of the engines' work.

Only moments are stored, all of one clock; each metric is worked out from them when it is asked for.
What the words mean is said once, in `summary.DEFINITIONS`.
"""

from array import array
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from pdjax.core.clock import Clock
from pdjax.core.ids import PoolId
from pdjax.host.handoff.accounting import Link, TransferTotals
from pdjax.host.metrics.observer import Observer
from pdjax.host.sequences.sequence import Sequence

MARKS = (
    "arrived",
    "admitted",
    "prefill_started",
    "first_token",
    "transfer_started",
    "transfer_landed",
    "decoding",
    "preempted",
    "finished",
)
"""Moments of a sequence's life; those between the ends may come again, after a preemption."""

TOKENS_EACH = 1000
"""Tokens, 8 bytes each, for which there is room per finished request that is kept: one may have
more if others have fewer."""
SPANS_EACH = 10
"""Spans that are kept per finished request."""


@dataclass(frozen=True)
class RequestMetrics:
    """Moments of one sequence, in seconds on the run's clock, and what follows from them.

    Attributes:
      id: of the sequence. arrival: moment of arrival.
      marks: (name, moment), in order; names are of `MARKS`.
      token_times: moment of each output token; in an array, which takes 8 bytes for each.
      prompt_tokens, cached_tokens: length of the prompt, and how much of it had its KV reused.
      transfer: its hand-offs.
      finish_reason: as in `Completion`; None while it runs.
    """

    id: str
    arrival: float
    marks: tuple[tuple[str, float], ...]
    token_times: Seq[float]
    prompt_tokens: int
    cached_tokens: int
    transfer: TransferTotals
    finish_reason: str | None

    @property
    def output_tokens(self) -> int:
        """Tokens generated."""
        return len(self.token_times)

    @property
    def preemptions(self) -> int:
        """Times that its KV was given up, to be computed again."""
        return sum(name == "preempted" for name, _ in self.marks)

    @property
    def queue(self) -> float | None:
        """Seconds from arrival to the dispatch of its first prefill chunk."""
        start = next((moment for name, moment in self.marks if name == "prefill_started"), None)
        return None if start is None else start - self.arrival

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
    def failed(self) -> bool:
        """Whether it ended in an error."""
        return self.finish_reason == "error"

    @property
    def completed(self) -> bool:
        """Whether it ran to its proper end, neither aborted nor failed."""
        return self.finish_reason in ("stop", "length")

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names of `summary.DEFINITIONS`; latencies in milliseconds."""
        return {
            "id": self.id,
            "finish_reason": self.finish_reason,
            "arrival_s": self.arrival,
            "input_len": self.prompt_tokens,
            "cached_len": self.cached_tokens,
            "output_len": self.output_tokens,
            "queue_ms": in_ms(self.queue),
            "ttft_ms": in_ms(self.ttft),
            "tpot_ms": in_ms(self.tpot),
            "e2el_ms": in_ms(self.e2e),
            "itls_ms": [in_ms(gap) for gap in self.itl],
            "preemptions": self.preemptions,
            "transfer": self.transfer.to_json(),
        }


class Span(NamedTuple):
    """Something that took time on a track, such as a step of an engine; seconds.

    `args` are its numbers, which add up over a track; `who` names the sequences that it served,
    for the trace alone.
    """

    track: str
    name: str
    start: float
    end: float
    args: Mapping[str, float]
    who: str = ""


@dataclass
class EngineMetrics:
    """The work of one track so far.

    Attributes:
      steps: spans recorded.
      busy_seconds: time covered by at least one of them.
      sums: their arguments, added up.
    """

    steps: int = 0
    busy_seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    _last_end: float = float("-inf")

    def add(self, span: Span) -> None:
        """Count one more span; spans of a track come in the order of their ends."""
        self.steps += 1
        # With lookahead a step is dispatched before its predecessor has ended: count that once.
        self.busy_seconds += max(0.0, span.end - max(span.start, self._last_end))
        self._last_end = max(self._last_end, span.end)
        for name, value in span.args.items():
            self.sums[name] = self.sums.get(name, 0) + value

    @property
    def occupancy(self) -> float | None:
        """Mean share of rows that were active in a tick; None on a track without rows."""
        rows = self.sums.get("rows", 0)
        return self.sums["rows_active"] / rows if rows else None

    @property
    def bubble_share(self) -> float | None:
        """Stage-ticks without an active row / all stage-ticks; None on a track without stages.

        Each tick dispatched runs every stage once. A stage whose microbatch has no active row does
        useless work, or waits for one: a bubble. Time in which nothing was dispatched is not
        counted.
        """
        stages = self.sums.get("stages", 0)
        return 1 - self.sums["stages_active"] / stages if stages else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "steps": self.steps,
            "busy_seconds": self.busy_seconds,
            "occupancy": self.occupancy,
            "bubble_share": self.bubble_share,
            "sums": dict(self.sums),
        }


@dataclass
class _Timeline:
    """A RequestMetrics in the making."""

    marks: list[tuple[str, float]] = field(default_factory=list)
    token_times: "array[float]" = field(default_factory=lambda: array("d"))
    transfer: TransferTotals = field(default_factory=TransferTotals)


class Recorder:
    """Takes down what the coordinator reports, and answers with metrics.

    A server runs for weeks, so only the newest finished requests and spans are kept; the totals
    (`engines`, `transfers`, `links`) are of the whole run, and there are as many as engines and
    pairs of engines.

    Args:
      clock: gives the moments.
      keep: most finished requests that are kept; `TOKENS_EACH` times as many moments of their
        tokens, and `SPANS_EACH` times as many spans.

    Attributes:
      observer: watches the coordinator's work as it happens.
    """

    def __init__(self, clock: Clock, keep: int = 10_000) -> None:
        self._clock = clock
        self.observer = Observer()
        self._live: dict[Sequence, _Timeline] = {}
        # Of finished ones, for as long as they are known elsewhere.
        self._ended: WeakKeyDictionary[Sequence, _Timeline] = WeakKeyDictionary()
        self._keep, self._tokens = keep, 0
        self._finished: deque[RequestMetrics] = deque()
        self._spans: deque[Span] = deque(maxlen=keep * SPANS_EACH)
        self.engines: dict[str, EngineMetrics] = {}
        self.transfers = TransferTotals()
        self.links: dict[str, Link] = {}

    def mark(self, seq: Sequence, name: str) -> None:
        """Note that `seq` has come to `name`, now; "arrived" is dated by the request itself.

        At "finished" the `finish_reason` is known already: the metrics are taken then.

        Raises:
          ValueError: a name that is not in `MARKS`.
        """
        if name not in MARKS:
            raise ValueError(f"mark={name!r}: allowed are {', '.join(MARKS)}")
        moment = seq.request.arrival if name == "arrived" else self._clock.now()
        self._timeline(seq).marks.append((name, moment))
        if name == "finished":
            self._ended[seq] = self._live.pop(seq)
            self._finish(self.request(seq))

    def has_ended(self, seq: Sequence) -> bool:
        """Whether `seq` has come to "finished"."""
        return seq in self._ended

    def _finish(self, metrics: RequestMetrics) -> None:
        """Keep the metrics of one more request, and drop the oldest beyond the bounds."""
        finished = self._finished
        finished.append(metrics)
        self._tokens += metrics.output_tokens
        while len(finished) > self._keep or (
            self._tokens > self._keep * TOKENS_EACH and len(finished) > 1
        ):
            self._tokens -= finished.popleft().output_tokens

    def now(self) -> float:
        """This moment, on the clock of the run."""
        return self._clock.now()

    def token(self, seq: Sequence, moment: float) -> None:
        """Note that an output token of `seq`, the first or a later one, reached the host then."""
        timeline = self._live.get(seq) or self._timeline(seq)
        timeline.token_times.append(moment)

    def transfer(self, seq: Sequence, costs: TransferTotals) -> None:
        """Note a hand-off of `seq` that has landed."""
        self._timeline(seq).transfer.add(costs)
        self.transfers.add(costs)

    def link(self, source: PoolId, target: PoolId) -> Link:
        """What has moved from one pool to another."""
        return self.links.setdefault(f"{source}->{target}", Link())

    def span(
        self, track: str, name: str, start: float, end: float, *, who: str = "", **args: float
    ) -> None:
        """Note a piece of work: the track is an engine's name or "transfer/POOL->POOL".

        A decode tick carries `rows_active`, `rows`, `stages_active` and `stages`, the last two
        counting stages whose microbatch had an active row. Any other number may be added; it is
        summed and shown in the trace, which also shows `who` was served.
        """
        span = Span(track, name, start, end, args, who)
        self._spans.append(span)
        metrics = self.engines.get(track)
        if metrics is None:
            metrics = self.engines[track] = EngineMetrics()
        metrics.add(span)

    def request(self, seq: Sequence) -> RequestMetrics:
        """The metrics of a sequence, finished or not."""
        timeline = self._ended.get(seq) or self._live.get(seq) or _Timeline()
        return RequestMetrics(
            id=seq.id,
            arrival=seq.request.arrival,
            marks=tuple(timeline.marks),
            token_times=timeline.token_times[:],
            prompt_tokens=seq.prompt_len,
            cached_tokens=seq.cached_tokens,
            transfer=replace(timeline.transfer),
            finish_reason=seq.finish_reason,
        )

    def requests(self) -> list[RequestMetrics]:
        """The metrics of the finished sequences, in the order of arrival."""
        return sorted(self._finished, key=lambda metrics: metrics.arrival)

    def spans(self) -> list[Span]:
        """The work recorded, in the order of its end."""
        return list(self._spans)

    def clear(self) -> None:
        """Forget finished requests, spans and totals, as after a warm-up."""
        self._finished.clear()
        self._tokens = 0
        self._spans.clear()
        self.engines.clear()
        self.transfers = TransferTotals()
        self.links = {name: Link(peak=link.peak) for name, link in self.links.items()}

    def _timeline(self, seq: Sequence) -> _Timeline:
        ended = self._ended.get(seq)
        return ended if ended is not None else self._live.setdefault(seq, _Timeline())


def in_ms(seconds: float | None) -> float | None:
    """Seconds as milliseconds."""
    return None if seconds is None else seconds * 1e3
