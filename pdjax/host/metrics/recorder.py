"""What happened, when: the marks of a sequence's life, and the work of engines and links.

Only moments are stored, all of one clock; each metric is worked out from them when it is asked for.
What the words mean is said once, in `definitions.py`.
"""

from array import array
from collections import defaultdict, deque
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from pdjax.core.clock import Clock
from pdjax.core.ids import EngineId, PoolId
from pdjax.host.handoff.accounting import Link, TransferTotals
from pdjax.host.metrics.observer import Observer
from pdjax.host.metrics.request import MARKS, RequestMetrics
from pdjax.host.metrics.work import (
    Duty,
    DutyTotals,
    EngineMetrics,
    FreePages,
    Shipment,
    Span,
)
from pdjax.host.sequences.sequence import Sequence

TOKENS_EACH = 1000
"""Tokens, 8 bytes each, for which there is room per finished request that is kept: one may have
more if others have fewer."""
SPANS_EACH = 10
"""Spans that are kept per finished request; as many moments of free pages, and half as many
shipments."""


@dataclass(slots=True)
class _Timeline:
    """A RequestMetrics in the making."""

    marks: list[tuple[str, float]] = field(default_factory=list)
    token_times: "array[float]" = field(default_factory=lambda: array("d"))
    transfer: TransferTotals = field(default_factory=TransferTotals)
    local: bool | None = None


class Recorder:
    """Takes down what the coordinator reports, and answers with metrics.

    A server runs for weeks, so only the newest finished requests, spans, shipments and moments of
    free pages are kept; the totals (`engines`, `duties`, `transfers`, `links`) are of the whole
    run, and there are as many as engines and pairs of pools.

    Args:
      clock: gives the moments.
      keep: most finished requests that are kept; `TOKENS_EACH` times as many moments of their
        tokens, and `SPANS_EACH` times as many spans.

    Attributes:
      observer: watches the coordinator's work as it happens.
      output_tokens: of all sequences of the run.
      local_prefills, remote_prefills: sequences of the run that were prefilled first on an engine
        that decodes, too, or on one that is for prefill alone.
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
        self._shipments: deque[Shipment] = deque(maxlen=keep * SPANS_EACH // 2)
        self._free_pages: deque[FreePages] = deque(maxlen=keep * SPANS_EACH)
        self._duties: deque[Duty] = deque(maxlen=keep)
        self._free: dict[PoolId, int] = {}
        self.duties: defaultdict[str, DutyTotals] = defaultdict(DutyTotals)
        self.engines: dict[str, EngineMetrics] = {}
        self.transfers = TransferTotals()
        self.links: dict[str, Link] = {}
        self.output_tokens = 0
        self.local_prefills = self.remote_prefills = 0

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

    def prefilled_at(self, seq: Sequence, *, local: bool) -> None:
        """Note where `seq` is prefilled: on an engine that decodes, too (`local`), or on one that
        is for prefill alone. The first time counts."""
        timeline = self._timeline(seq)
        if timeline.local is None:
            timeline.local = local
            self.local_prefills += local
            self.remote_prefills += not local

    def now(self) -> float:
        """This moment, on the clock of the run."""
        return self._clock.now()

    def token(self, seq: Sequence, moment: float) -> None:
        """Note that an output token of `seq`, the first or a later one, reached the host then."""
        (self._live.get(seq) or self._timeline(seq)).token_times.append(moment)
        self.output_tokens += 1

    def cut(self, seq: Sequence, tokens: int) -> None:
        """Forget the output tokens of `seq` behind the first `tokens`."""
        del self._timeline(seq).token_times[tokens:]

    def transfer(self, seq: Sequence, costs: TransferTotals) -> None:
        """Note a hand-off of `seq` that has landed, but for the writing of its KV."""
        self._timeline(seq).transfer.add(costs)
        self.transfers.add_handoff(costs)

    def written(self, seq: Sequence, seconds: float) -> None:
        """Note that writing KV of `seq` after a transfer has taken so long."""
        self._timeline(seq).transfer.scatter_s += seconds
        self.transfers.scatter_s += seconds

    def shipment(self, shipment: Shipment) -> None:
        """Note a transfer job that has been written, or has arrived and is not wanted."""
        self._shipments.append(shipment)

    def free_pages(self, pool: PoolId, pages: int) -> None:
        """Note how many pages of a pool are free now."""
        if self._free.get(pool) != pages:
            self._free[pool] = pages
            self._free_pages.append(FreePages(pool, self._clock.now(), pages))

    def link(self, source: PoolId, target: PoolId) -> Link:
        """What has moved from one pool to another."""
        name = f"{source}->{target}"
        link = self.links.get(name)
        if link is None:
            link = self.links[name] = Link()
        return link

    def span(
        self,
        track: str,
        name: str,
        start: float,
        end: float,
        *,
        who: str = "",
        number: int = 0,
        **counts: int,
    ) -> None:
        """Note a step of an engine; see `Span`.

        A decode tick carries `rows_active`, `rows`, `stages_active` and `stages`, the last two
        counting stages whose microbatch had an active row. Any other count may be added; it is
        summed and shown in the trace, which also shows `who` was served.
        """
        span = Span(track, name, start, end, counts, who, number)
        self._spans.append(span)
        metrics = self.engines.get(track)
        if metrics is None:
            metrics = self.engines[track] = EngineMetrics()
        metrics.add(span)

    def drained(self, engine: EngineId, name: str, start: float, cause: str) -> None:
        """Note that an engine has drained from `start` until now; `name` says for what."""
        now = self._clock.now()
        self._duties.append(Duty(engine, name, start, now, cause))
        self.duties[engine].draining_s += now - start

    def changed_role(self, engine: EngineId) -> None:
        """Note that an engine has another role."""
        self.duties[engine].role_changes += 1

    def went_out(self, engine: EngineId) -> None:
        """Note that an engine is out of service."""
        self.duties[engine].outages += 1

    def came_back(self, engine: EngineId, start: float, cause: str) -> None:
        """Note that an engine is in service again that was out of it from `start` on."""
        now = self._clock.now()
        self._duties.append(Duty(engine, "out of service", start, now, cause))
        self.duties[engine].out_of_service_s += now - start

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
            local=timeline.local,
        )

    def requests(self) -> list[RequestMetrics]:
        """The metrics of the finished sequences, in the order of arrival."""
        return sorted(self._finished, key=lambda metrics: metrics.arrival)

    def newest(self, most: int) -> list[RequestMetrics]:
        """The metrics of the sequences that finished last, at most so many, in that order."""
        return list(self._finished)[-most:]

    def unfinished(self, most: int | None = None) -> list[RequestMetrics]:
        """The metrics so far of the sequences that have not ended, in the order of arrival; at most
        so many, of those that have been here longest."""
        live = list(self._live)[:most]
        return sorted(map(self.request, live), key=lambda metrics: metrics.arrival)

    def spans(self) -> list[Span]:
        """The steps recorded, in the order of their ends."""
        return list(self._spans)

    def duty_of(self, engine: EngineId) -> DutyTotals:
        """How often an engine has changed, and how long it was not given all that it could be."""
        return self.duties.get(engine) or DutyTotals()

    def all_duties(self) -> list[Duty]:
        """When engines drained or were out of service, in the order of their ends."""
        return list(self._duties)

    def shipments(self) -> list[Shipment]:
        """The shipments recorded, in the order of their ends."""
        return list(self._shipments)

    def pages(self) -> list[FreePages]:
        """How many pages of each pool were free: as it was last before a moment."""
        return list(self._free_pages)

    def clear(self) -> None:
        """Forget finished requests, work and totals, as after a warm-up."""
        self._finished.clear()
        self._tokens = 0
        self._spans.clear()
        self._shipments.clear()
        self._free_pages.clear()
        self._free.clear()
        self._duties.clear()
        self.duties.clear()
        self.engines.clear()
        self.output_tokens = 0
        self.local_prefills = self.remote_prefills = 0
        self.transfers = TransferTotals()
        self.links = {name: Link(peak=link.peak) for name, link in self.links.items()}

    def _timeline(self, seq: Sequence) -> _Timeline:
        timeline = self._live.get(seq) or self._ended.get(seq)
        if timeline is None:
            timeline = self._live[seq] = _Timeline()
        return timeline
