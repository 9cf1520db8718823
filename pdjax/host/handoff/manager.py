"""The hand-offs of a deployment: reserve, then move, then release.

One mechanism moves KV between any two pools: from prefill to decode, while the prefill runs or
after it; back to the prefill side; and from one decode engine to another. Who moves, when and where
to is for `sched/` to decide; here is how, and what happens when it goes wrong:

    what did not arrive is sent again; what fails for good is prefilled anew; then it fails

An attempt fails if a shipment raises, arrives damaged, or has not landed when it is due. At any
moment a hand-off can be closed, and every page that it holds, at both ends, is free again at once.
"""

import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from functools import partial

from pdjax.config import HandoffConfig
from pdjax.core.clock import Clock
from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.chunks import Chunk
from pdjax.host.engines import DecodeLane, Lane, PrefillLane
from pdjax.host.handoff.handoff import Handoff, Purpose, groups_of
from pdjax.host.handoff.transfer_queue import Shipping
from pdjax.host.kv.prefix_index import keys_of
from pdjax.host.losses import lose_pages
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.sequences.lifecycle import Roster
from pdjax.host.sequences.reference import Member
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.interfaces.transfer import Transfer

_LOG = logging.getLogger("pdjax")


class HandoffTimeout(RuntimeError):
    """A hand-off had not landed when it was due."""


class Handoffs:
    """Those that are open.

    Args:
      config: bounds of time, bytes and attempts.
      transfer: moves the bytes.
      roster: is told of every sequence that departs, arrives or fails.
      buckets: sizes of pages and shipments.
      clock, recorder: tell the time, and take down what happened when.
    """

    def __init__(
        self,
        config: HandoffConfig,
        transfer: Transfer,
        roster: Roster,
        buckets: Buckets,
        clock: Clock,
        recorder: Recorder,
    ) -> None:
        self._config, self._roster, self._buckets = config, roster, buckets
        self._clock, self._recorder = clock, recorder
        self._shipping = Shipping(
            config, transfer, buckets, clock, recorder, self._failed, self._lost
        )
        self._open: list[Handoff] = []
        self._opened = 0
        self._interrupt: BaseException | None = None

    @property
    def open(self) -> list[Handoff]:
        """Those that hold anything, the oldest first."""
        return [handoff for handoff in self._open if not handoff.closed]

    @property
    def busy(self) -> bool:
        """Whether anything is on its way, or still has to be."""
        return bool(self.open) or self._shipping.busy

    @property
    def migrating(self) -> bool:
        """Whether anybody is between two decode engines."""
        return any(
            isinstance(handoff.source, DecodeLane) and handoff.purpose is Purpose.DECODE
            for handoff in self.open
        )

    # How they begin.

    def fits(self, sequence: Sequence, target: DecodeLane) -> bool:
        """Whether a row, and the pages for what a sequence has, are free on `target` now: a plan
        may be carried out after its room has gone, or after its sequence has."""
        if sequence.done or sequence.handoff is not None:
            return False
        needs = 0 if target.shares_with else self._buckets.table_pages_for(sequence.length)
        rows = target.pipeline.rows - target.pipeline.taken_rows
        return rows > 0 and needs <= target.allocator.free_pages

    def reserve(self, sequence: Sequence, source: PrefillLane, target: DecodeLane) -> Handoff:
        """Hold a row and pages for a sequence that is being prefilled, or has been; of its KV
        nothing moves yet. What the target has of it already is not asked for again."""
        row = target.pipeline.reserve()
        tokens = sequence.length if sequence.state is State.PREFILLING else sequence.length - 1
        room = self._buckets.table_pages_for(sequence.length)
        handoff = self._make(sequence, Purpose.DECODE, source, target, tokens, room, row)
        sequence.handoff = handoff
        return handoff

    def begin(self, sequence: Sequence, source: PrefillLane, target: DecodeLane) -> None:
        """Hand over a sequence that has been prefilled. Where both ends share a pool there is
        nothing to move."""
        if target.shares_with:
            self._roster.seat(sequence, target, target.pipeline.reserve(), sequence.pages)
            return
        self.reserve(sequence, source, target)
        self.depart(sequence)

    def depart(self, sequence: Sequence) -> None:
        """A sequence with a reservation has its first token, and nothing to do until its KV is
        there."""
        handoff = sequence.handoff
        handoff.source_pages = self._roster.depart(sequence)
        self._on_its_way(handoff)

    def migrate(self, sequence: Sequence, source: DecodeLane, target: DecodeLane) -> None:
        """Move a sequence from one decode engine to another. A token that is being made for it is
        made again there: the same one, since chance depends on its position alone."""
        row = target.pipeline.reserve()
        pages = self._roster.leave_row(sequence)
        room = self._buckets.table_pages_for(sequence.length)
        tokens = sequence.length - 1
        handoff = self._make(sequence, Purpose.DECODE, source, target, tokens, room, row)
        sequence.handoff, handoff.source_pages = handoff, pages
        self._on_its_way(handoff)

    def give_back(self, sequence: Sequence, source: DecodeLane, target: PrefillLane) -> None:
        """Send what is left of the KV of a sequence that has ended to where its next turn will be
        prefilled. Does nothing if that would take more than half of the room there."""
        here, there = source.pool.prefixes, target.pool.prefixes
        if here is None or there is None or source.allocator is target.allocator:
            return
        pages = here.take(keys_of(sequence, here), sequence.length - 1)
        span = self._buckets.span
        tokens = len(pages) * here.page_size // span * span
        room = tokens // there.page_size
        known = len(there.match(keys_of(sequence, there)[:room]))
        # Those that are known may be among the free ones.
        if (
            tokens == 0
            or known == room
            or room - known > (target.allocator.free_pages - known) // 2
        ):
            source.allocator.free(pages)
            return
        handoff = self._make(sequence, Purpose.CACHE, source, target, tokens, room, row=-1)
        handoff.source_pages = pages
        self._on_its_way(handoff)

    def _make(
        self,
        sequence: Sequence,
        purpose: Purpose,
        source: Lane,
        target: Lane,
        tokens: int,
        room: int,
        row: int,
    ) -> Handoff:
        """Hold `room` pages of the target, of which some may have the KV of its first tokens."""
        span, prefixes = self._buckets.span, target.pool.prefixes
        there: list[int] = []
        if prefixes is not None:
            there = prefixes.take(keys_of(sequence, prefixes), tokens // span * span)
            whole = len(there) * prefixes.page_size // span * span // prefixes.page_size
            target.allocator.free(there[whole:])  # of a span that is not all there
            del there[whole:]
        self._opened += 1
        handoff = Handoff(
            id=self._opened,
            member=Member.of(sequence),
            purpose=purpose,
            source=source,
            target=target,
            groups=groups_of(source),
            tokens=tokens,
            span=span,
            target_pages=there + target.allocator.allocate(room - len(there)),
            skipped_tokens=len(there) * target.engine.layout.page_size,
            row=row,
            opened=self._clock.now(),
        )
        handoff.costs.pages_skipped = len(there)
        self._open.append(handoff)
        return handoff

    def _on_its_way(self, handoff: Handoff) -> None:
        handoff.has_computed(handoff.tokens)
        handoff.departed = self._clock.now()
        self._settle(handoff)

    # How they go on.

    def computing(self, chunks: Seq[Chunk], between: Callable[[], object]) -> Callable[[int], None]:
        """What is to be called after each layer group of a step over `chunks`: it sends what the
        group has written for those who have a reservation, and then calls `between`."""
        self._interrupt = None  # of a step that was broken off itself
        streaming = [
            (chunk.sequence.handoff, chunk.stop)
            for chunk in chunks
            if chunk.sequence.handoff is not None
        ]
        return partial(self._after_group, streaming, between)

    def computed(self, chunks: Iterable[Chunk]) -> None:
        """A step over `chunks` has been dispatched."""
        for chunk in chunks:
            if chunk.sequence.handoff is not None:
                chunk.sequence.handoff.has_computed(chunk.stop)

    def raise_interrupt(self) -> None:
        """Raise what came between the layer groups of a step and had to wait for its end."""
        interrupt, self._interrupt = self._interrupt, None
        if interrupt is not None:
            raise interrupt

    def _after_group(
        self, streaming: Seq[tuple[Handoff, int]], between: Callable[[], object], group: int
    ) -> None:
        if self._interrupt is not None:
            return
        try:
            if not self._shipping.blocked:  # or it would overtake
                self._shipping.send(
                    (handoff, handoff.sendable(group, computed), slice(group, group + 1))
                    for handoff, computed in streaming
                    if not handoff.closed
                )
            between()
        except BaseException as error:
            self._interrupt = error  # the engine is in the middle of a step

    def pump(self) -> bool:
        """Send whatever can leave now and has not. Returns whether there was anything."""
        self._open = self.open
        return self._shipping.send(
            (handoff, spans, groups) for handoff in self._open for spans, groups in handoff.unsent()
        )

    def land(self) -> bool:
        """Write what has arrived. Returns whether there was anything."""
        return self._shipping.land()

    def settle(self) -> bool:
        """Let the sequences decode whose KV has landed, all of it, and give up what is overdue.
        Returns whether anything was overdue."""
        # Every open hand-off is looked at, not only those of which something has come now: the
        # last part of one may have landed before its sequence departed.
        for handoff in self.open:
            self._settle(handoff)
        return self._expire()

    def _settle(self, handoff: Handoff) -> None:
        """It is done, if it is complete and its sequence waits for nothing else."""
        if handoff.closed or handoff.departed is None:
            return
        landed = self._clock.now()
        if not handoff.leave_if_complete():
            return
        sequence, target = handoff.sequence, handoff.target
        prefixes = target.pool.prefixes
        if prefixes is not None:
            sequence.found_in(prefixes, handoff.skipped_tokens)
            prefixes.insert(keys_of(sequence, prefixes), handoff.target_pages, handoff.tokens)
        if handoff.purpose is Purpose.CACHE:
            target.allocator.free(handoff.target_pages)
        else:
            assert isinstance(target, DecodeLane)
            sequence.handoff = None
            self._recorder.mark(sequence, "transfer_landed")
            self._roster.seat(sequence, target, handoff.row, handoff.target_pages)
        self._account(handoff, handoff.departed, landed)

    def _account(self, handoff: Handoff, departed: float, landed: float) -> None:
        """Take down what a hand-off has cost."""
        costs, (source, there) = handoff.costs, handoff.ends
        costs.transfers, costs.seconds = 1, landed - departed
        costs.hidden_s = max(0.0, costs.wire_s - costs.exposed_s)
        self._recorder.span(
            f"transfer/{source}->{there}",
            handoff.sequence.id,
            departed,
            landed,
            bytes=costs.bytes,
            pages=costs.pages,
        )
        self._recorder.transfer(handoff.sequence, costs)
        if costs.layout_changing_puts:
            _LOG.warning("%s: its hand-off changed a layout in a put, by way of the host", there)

    # How they go wrong.

    def withdraw(self, lane: DecodeLane) -> None:
        """Those who hold room on a lane and do not need it, or not yet, give it back: somebody who
        decodes needs it now. Who is being prefilled will be handed over when he has been."""
        for handoff in self.open:
            if handoff.purpose is Purpose.CACHE and lane in (handoff.source, handoff.target):
                handoff.close()
            elif handoff.target is lane and handoff.departed is None:
                handoff.withdraw()

    def _expire(self) -> bool:
        """Give up what is overdue. Returns whether there was anything."""
        now, lease, deadline = self._clock.now(), self._config.lease, self._config.deadline
        overdue = []
        for handoff in self.open:
            if handoff.departed is None:
                if lease is not None and now - handoff.opened > lease:
                    handoff.withdraw()
            elif deadline is not None and handoff.waiting_since(now) > deadline:
                overdue.append(handoff)
        for handoff in overdue:
            self._failed(handoff, HandoffTimeout(f"not landed within {deadline} s"))
        return bool(overdue)

    def _failed(self, handoff: Handoff, error: BaseException) -> None:
        """An attempt went wrong. Whatever of it is on its way has to be sent again, so that it is
        one attempt, however many shipments it had."""
        if not handoff.wanted:
            return
        handoff.disown()
        handoff.attempts += 1
        self._recorder.transfers.retries += 1
        if handoff.attempts <= self._config.retries:
            return
        sequence = handoff.sequence
        if handoff.purpose is Purpose.CACHE:
            handoff.close()
        elif handoff.departed is None:
            handoff.withdraw()  # it is still being prefilled: there will be another
        elif isinstance(handoff.source, DecodeLane):
            self._stay(handoff, handoff.source)
        elif sequence.failed_handoffs < self._config.reprefills:
            sequence.failed_handoffs += 1
            _LOG.warning("%s: prefilled anew, its hand-off failed: %s", sequence.id, error)
            self._recorder.transfers.reprefilled_tokens += sequence.length
            self._roster.preempt(sequence)
        else:
            self._roster.fail(sequence, error)

    def _stay(self, handoff: Handoff, source: DecodeLane) -> None:
        """A sequence that was to change engines goes on where it was, if there still is a row."""
        sequence = handoff.sequence
        sequence.streams = False
        if source.pipeline.taken_rows == source.pipeline.rows:
            self._roster.preempt(sequence)
            return
        pages = handoff.stay()
        sequence.handoff = None
        self._roster.seat(sequence, source, source.pipeline.reserve(), pages)

    def _lost(self, handoff: Handoff, error: BaseException) -> None:
        """What had landed has not been written after all: whoever decodes by it has failed.

        Engines work in order, so that this is seen before anybody can have gone on to another
        engine with what he has read.
        """
        if not handoff.completed:
            return  # nobody relied on it, and it is sent again where anybody still wants it
        prefixes, sequence = handoff.target.pool.prefixes, handoff.sequence
        if prefixes is not None:
            found = prefixes.match(keys_of(sequence, prefixes))
            lost = set(found).intersection(handoff.target_pages)  # that are not somebody else's now
            lose_pages(handoff.target, lost, error, self._roster, self.open)
        if handoff.purpose is Purpose.DECODE and not sequence.done:
            self._roster.fail(sequence, error)  # wherever it is: it may have said what is wrong
