"""The ticks of the decode engines: which sequences enter them, what comes back."""

from collections.abc import Sequence as Seq

from pdjax.core.clock import Clock
from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.decode_pipeline import Tick
from pdjax.host.batching.prefill_batch import history
from pdjax.host.engines import DecodeLane, InFlight
from pdjax.host.handoff.manager import Handoffs
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.policies.api import DecodeScheduler
from pdjax.host.sequences.lifecycle import Roster, read
from pdjax.host.sequences.reference import names
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.interfaces.batches import Sampled


class Decoding:
    """Dispatches and harvests ticks.

    Args:
      lanes: the decode engines.
      roster, handoffs: move sequences, and give up room that is held ahead.
      scheduler: says which sequences give way when pages run out.
      buckets: sizes of pages and of a penalized sequence's history.
      lookahead: ticks that may be in flight when another one is dispatched.
      clock, recorder: tell the time, and take down what happened when.
    """

    def __init__(
        self,
        lanes: Seq[DecodeLane],
        roster: Roster,
        handoffs: Handoffs,
        scheduler: DecodeScheduler,
        buckets: Buckets,
        lookahead: int,
        clock: Clock,
        recorder: Recorder,
    ) -> None:
        self._lanes, self._roster, self._handoffs = lanes, roster, handoffs
        self._scheduler, self._buckets, self._lookahead = scheduler, buckets, lookahead
        self._clock, self._recorder = clock, recorder

    def dispatch(self) -> bool:
        """A tick of each engine that has something to do and few ticks in flight. Returns whether
        there was any."""
        ready = [
            lane
            for lane in self._lanes
            if len(lane.in_flight) <= self._lookahead and lane.pipeline.active
        ]
        for lane in ready:
            lane.pipeline.align()
            self._grow(lane)
            self._remember(lane)
            if lane.pipeline.active:  # not every sequence had to give way
                self._tick(lane, lane.pipeline.tick())
        return bool(ready)

    def _grow(self, lane: DecodeLane) -> None:
        """Give each sequence that enters a page for the position that it writes."""
        needy = lane.pipeline.needy()
        if len(needy) > lane.allocator.free_pages:
            self._handoffs.withdraw(lane)
        while needy:
            holders = self._roster.holders(lane)
            plan = self._scheduler.grow(needy, holders, lane.allocator.free_pages)
            for victim in plan.victims:
                self._roster.preempt(victim)
            # A victim may have shared its pages: then fewer are free than the plan counted on.
            for sequence in plan.grown[: lane.allocator.free_pages]:
                if sequence.state is State.DECODING:
                    sequence.pages += lane.allocator.allocate(1)
            needy = lane.pipeline.needy()

    def _remember(self, lane: DecodeLane) -> None:
        """Tell the device the tokens so far of penalized sequences that join.

        Not before they join: until then the device may still sample for the row's last sequence.
        """
        for sequence in lane.pipeline.joining():
            if sequence.request.params.penalized:
                try:
                    lane.engine.remember(sequence.row, history(sequence.token_ids, self._buckets))
                except Exception as error:
                    self._roster.fail(sequence, error)

    def _tick(self, lane: DecodeLane, tick: Tick) -> None:
        started = self._clock.now()
        try:
            ticket = lane.engine.tick(tick.batch)
        except BaseException as error:
            # An interrupt, too, leaves open how far the device has come.
            self._roster.fail_all(tick.aboard, error)
            if not isinstance(error, Exception):
                raise
        else:
            lane.in_flight.append(InFlight(tick, ticket, started, tick.aboard))

    def harvest(self, lane: DecodeLane, done: InFlight[Tick, Sampled]) -> list[Sequence]:
        """A tick has come back: each row that leaves has its sequence's next token. Returns the
        sequences that have ended well."""
        tick = done.work
        self._recorder.span(
            f"decode/{lane.index}",
            "tick",
            done.started,
            self._clock.now(),
            rows_active=len(tick.aboard),
            rows=lane.pipeline.rows,
            stages_active=tick.stages_active,
            stages=lane.pipeline.stages,
            who=names(done.members),
        )
        sampled = read(done, self._roster)
        return [] if sampled is None else self._roster.accept(tick.leaving, sampled)
