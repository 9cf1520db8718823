"""The steps of the prefill engines: who joins them, what leaves while they run, what comes back."""

from collections.abc import Callable
from collections.abc import Sequence as Seq

from pdjax.core.clock import Clock
from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.chunks import Chunk
from pdjax.host.batching.prefill_batch import prefill_batch
from pdjax.host.engines import DecodeLane, InFlight, PrefillLane
from pdjax.host.handoff.manager import Handoffs
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.policies.api import DecodeScheduler, HandoffScheduler
from pdjax.host.sequences.lifecycle import Roster, read
from pdjax.host.sequences.reference import Member, names
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.host.views import decode_view
from pdjax.interfaces.batches import NOT_FINITE, Sampled


class Prefilling:
    """Carries out what the prefill scheduler has planned.

    Args:
      decode: where room can be reserved ahead.
      roster, handoffs: move sequences, and their KV.
      decode_scheduler, handoff_scheduler: say for whom room is reserved, and who stays.
      buckets: sizes of batches and pages.
      clock, recorder: tell the time, and take down what happened when.
      between: called between the layer groups of a step. To dispatch a step of a large model takes
        the host as long as a decode step takes, and decode must not wait for it.
    """

    def __init__(
        self,
        decode: Seq[DecodeLane],
        roster: Roster,
        handoffs: Handoffs,
        decode_scheduler: DecodeScheduler,
        handoff_scheduler: HandoffScheduler,
        buckets: Buckets,
        clock: Clock,
        recorder: Recorder,
        between: Callable[[], object],
    ) -> None:
        self._between = between
        self._decode, self._roster, self._handoffs = decode, roster, handoffs
        self._decode_scheduler, self._handoff_scheduler = decode_scheduler, handoff_scheduler
        self._buckets, self._clock, self._recorder = buckets, clock, recorder

    def dispatch(self, lane: PrefillLane, chunks: tuple[Chunk, ...]) -> None:
        """Dispatch a step over `chunks`, as far as they can still be computed as planned. KV of
        sequences that have room on the decode side leaves as the step runs."""
        chunks = self._possible(lane, chunks)
        if not chunks:
            return
        newcomers = [chunk for chunk in chunks if chunk.sequence.state is State.WAITING]
        self._roster.admit(
            lane,
            [
                (chunk.sequence, chunk.start, self._buckets.pages_for(chunk.sequence.length))
                for chunk in newcomers
            ],
        )
        for chunk in newcomers:
            self._recorder.mark(chunk.sequence, "prefill_started")
        lane.steps += 1
        for chunk in chunks:
            chunk.sequence.prefilled, chunk.sequence.served = chunk.stop, lane.steps
        self._reserve_ahead(lane, chunks)
        batch, started = prefill_batch(chunks, self._buckets), self._clock.now()
        members = tuple(Member.of(chunk.sequence) for chunk in chunks)
        try:
            after_group = None
            if not any(lane.index in decode.shares_with for decode in self._decode):
                after_group = self._handoffs.computing(chunks, self._between)
            ticket = lane.engine.prefill(batch, after_group)
        except BaseException as error:
            self._roster.fail_all(members, error)
            if not isinstance(error, Exception):
                raise
        else:
            lane.in_flight.append(InFlight(chunks, ticket, started, members))
            self._handoffs.computed(chunks)
        self._handoffs.raise_interrupt()

    def _possible(self, lane: PrefillLane, chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
        """The chunks that are still as their plan found them; the next plan sees to the others.

        Decode is served between the layer groups of another engine's step. There a sequence may be
        aborted, fail, or be preempted, and cached pages may be lost or evicted.
        """
        free, prefixes, possible = lane.allocator.free_pages, lane.pool.prefixes, []
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.state is State.WAITING:
                known = prefixes.known_tokens(sequence, chunk.start) if prefixes is not None else 0
                needs = self._buckets.pages_for(sequence.length)
                if known < chunk.start or needs > free:
                    continue
                free -= needs
            elif (
                sequence.state is not State.PREFILLING
                or sequence.engine != lane.index
                or sequence.prefilled != chunk.start
            ):
                continue
            possible.append(chunk)
        return tuple(possible)

    def _reserve_ahead(self, lane: PrefillLane, chunks: tuple[Chunk, ...]) -> None:
        """Find room for those whose KV may leave while it is being computed."""
        streaming = [
            chunk.sequence
            for chunk in chunks
            if chunk.sequence.handoff is None and self._handoff_scheduler.streams(chunk.sequence)
        ]
        if streaming and not self._roster.prefilled:
            views = [decode_view(each) for each in self._decode if not each.shares_with]
            for admission in self._decode_scheduler.admit(streaming, views):
                target = self._decode[admission.engine]
                if self._handoffs.fits(admission.sequence, target):
                    self._handoffs.reserve(admission.sequence, lane, target)

    def harvest(self, lane: PrefillLane, done: InFlight[tuple[Chunk, ...], Sampled]) -> None:
        """A step has come back: whoever is prefilled by it has his next token."""
        tokens = sum(chunk.tokens for chunk in done.work)
        self._recorder.span(
            f"prefill/{lane.index}",
            "step",
            done.started,
            self._clock.now(),
            tokens=tokens,
            sequences=len(done.work),
            who=names(done.members),
        )
        sampled = read(done, self._roster)
        if sampled is None:
            return
        for row, (chunk, member) in enumerate(zip(done.work, done.members, strict=True)):
            if not member.current:
                continue
            sequence = chunk.sequence
            if sampled.tokens[row] == NOT_FINITE:  # nor is what the chunk has written
                self._roster.fail_not_finite(sequence)
                continue
            self._roster.computed(sequence, lane, chunk.stop)
            if not chunk.last:
                continue
            if not sequence.output:
                self._recorder.mark(sequence, "first_token")
            self._roster.accept([(row, member)], sampled)
            if not sequence.done and not self._stays(sequence, lane):
                self._roster.wait_for_decode(sequence)
                if sequence.handoff is not None:
                    self._handoffs.depart(sequence)

    def _stays(self, sequence: Sequence, lane: PrefillLane) -> bool:
        """Whether its next token is made here, too, and there is room for that."""
        if not self._handoff_scheduler.stays(sequence):
            return False
        missing = self._buckets.pages_for(sequence.length) - len(sequence.pages)
        if missing > lane.allocator.free_pages:
            return False
        sequence.pages += lane.allocator.allocate(missing)
        return True
