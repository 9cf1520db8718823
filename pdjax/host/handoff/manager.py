"""The hand-offs of a deployment: reserve, then move, then release.

One mechanism moves KV between any two pools: from prefill to decode, while the prefill runs or
after it; back to the prefill side; and from one decode engine to another. Policies decide which
sequences move, when and where to; here is how, and what happens when it goes wrong:

    what did not arrive is sent again; what fails for good is prefilled again; then it fails

An attempt fails if a job raises, arrives damaged, or has not arrived when it is due. At any moment
a hand-off can be closed, and every page that it holds, at both ends, is free again at once.
"""

import logging
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from functools import cache

from pdjax.config import HandoffConfig
from pdjax.host.batching.chunks import Chunk
from pdjax.host.engines import EngineState
from pdjax.host.fleet import Fleet
from pdjax.host.handoff.deadlines import Deadlines
from pdjax.host.handoff.handoff import Handoff, Purpose, unsent_of, whole
from pdjax.host.handoff.reservations import reservations_in
from pdjax.host.handoff.run_ahead import RunAhead
from pdjax.host.handoff.spans import Spans
from pdjax.host.handoff.transfer_queue import TransferQueue
from pdjax.host.kv.pools import PoolState
from pdjax.host.kv.prefix_index import keys_of
from pdjax.host.losses import lose_written
from pdjax.host.policies.api import GiveBack, HandoffPolicy
from pdjax.host.policies.check import agrees, check_withdrawals
from pdjax.host.runtime import Runtime
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.sequences.reference import SequenceRef
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.interfaces.engine import StepTicket
from pdjax.interfaces.transport import Transport

_LOG = logging.getLogger("pdjax")


class HandoffTimeout(RuntimeError):
    """A hand-off had not arrived when it was due."""


class HandoffManager:
    """The open hand-offs.

    Args:
      config: bounds of time, bytes and attempts.
      fleet: engines and pools.
      transport: moves the bytes.
      lifecycle: is told of every sequence that leaves, arrives or fails.
      policy: says which reservations are given up.
      max_model_len: tokens of the longest sequence.
      numbers: ids for jobs, unique over all managers of a coordinator.
      runtime: events, clock and recorder.
    """

    def __init__(
        self,
        config: HandoffConfig,
        fleet: Fleet,
        transport: Transport,
        lifecycle: SequenceLifecycle,
        policy: HandoffPolicy,
        max_model_len: int,
        numbers: Iterable[int],
        runtime: Runtime,
    ) -> None:
        self._config, self._fleet, self._lifecycle = config, fleet, lifecycle
        self._policy, self._clock, self._recorder = policy, runtime.clock, runtime.recorder
        told = self._written, self._failed, self._lost
        self.queue = TransferQueue(config, transport, runtime, *told, numbers)
        self.ahead = RunAhead(config, transport, self.queue)
        self._deadlines = Deadlines(config, runtime)
        self._open: dict[int, Handoff] = {}
        self._opened = 0
        self._to_send: dict[int, Handoff] = {}  # that may have something to send
        self._to_settle: dict[int, Handoff] = {}  # of which something has been written

        @cache
        def spans(source: PoolState, target: PoolState) -> Spans:
            return Spans.between(source.layout, target.layout, max_model_len)

        self.spans = spans

    @property
    def open(self) -> list[Handoff]:
        """Those that hold anything, the oldest first."""
        self._open = {key: handoff for key, handoff in self._open.items() if not handoff.closed}
        return list(self._open.values())

    @property
    def busy(self) -> bool:
        """Whether anything is on its way, or still has to be. Changes nothing, since another thread
        than the one that drives may ask."""
        return self.queue.busy or not all(each.closed for each in list(self._open.values()))

    @property
    def migrating(self) -> int:
        """Sequences that are between two decode engines."""
        return sum(handoff.purpose is Purpose.MIGRATE for handoff in self.open)

    # How they begin.

    def fits(self, sequence: Sequence, target: EngineState) -> bool:
        """Whether a row, and the pages for what a sequence has, are free on an engine now: the
        plans that were carried out before this one may have taken them."""
        if sequence.done or sequence.handoff is not None:
            return False
        moves = target.pool.id != sequence.pool
        needs = target.buckets.pages_for(sequence.length) if moves else 0
        return target.free_rows > 0 and needs <= target.allocator.free_pages

    def reserve(
        self, sequence: Sequence, target: EngineState, purpose: Purpose = Purpose.DECODE
    ) -> Handoff:
        """Hold a row and pages for a sequence; of its KV nothing moves yet. What the target has of
        it already is not sent."""
        source = self._lifecycle.engine_of(sequence)
        row = target.rows.reserve()
        tokens = sequence.length if sequence.state is State.PREFILLING else sequence.length - 1
        room = target.buckets.pages_for(sequence.length)
        groups = source.engine.layer_groups
        if purpose is Purpose.MIGRATE:
            groups = whole(source.pool)
        handoff = self._make(
            sequence, purpose, source.pool, target.pool, groups, tokens, room, target, row
        )
        sequence.handoff = handoff
        return handoff

    def begin(self, sequence: Sequence, target: EngineState) -> None:
        """Let a prefilled sequence go on on an engine. Where its pool is the engine's, nothing
        moves."""
        if target.pool.id == sequence.pool:
            row, pages = target.rows.reserve(), sequence.pages
            self._lifecycle.start_decoding(sequence, target, row, pages)
            return
        self.reserve(sequence, target)
        self.depart(sequence)

    def depart(self, sequence: Sequence) -> None:
        """A sequence with a reservation has its first token, and waits only for its KV."""
        handoff: Handoff = sequence.handoff
        handoff.take_source(self._lifecycle.detach(sequence))
        self._on_its_way(handoff)

    def migrate(self, sequence: Sequence, target: EngineState) -> None:
        """Move a sequence from one decode engine to another. A token that is being made for it is
        made again there: the same one, since chance depends on its position alone."""
        handoff = self.reserve(sequence, target, Purpose.MIGRATE)
        handoff.take_source(self._lifecycle.leave_row(sequence))
        handoff.ref = SequenceRef.of(sequence)
        self._on_its_way(handoff)

    def give_back(self, sequence: Sequence, source: PoolState, target: PoolState) -> None:
        """Send what is left of the KV of a sequence that has ended to the pool where its next turn
        will be prefilled, if the policy says so."""
        here, there = source.prefixes, target.prefixes
        if here is None or there is None or source is target:
            return
        pages = here.take(keys_of(sequence, here), sequence.length - 1)
        span = self.spans(source, target).tokens
        tokens = len(pages) * here.page_size // span * span
        room = tokens // there.page_size
        known = len(there.match(keys_of(sequence, there)[:room]))
        # Those that are known may be among the free ones.
        free = target.allocator.free_pages - known
        move = GiveBack(sequence, tokens, room - known, free)
        useful = tokens > 0 and known < room and move.pages <= free
        if not useful or not agrees(self._policy, "gives_back", move):
            source.allocator.free(pages)
            return
        handoff = self._make(
            sequence, Purpose.CACHE, source, target, whole(source), tokens, room, None, -1
        )
        handoff.take_source(pages)
        self._on_its_way(handoff)

    def _make(
        self,
        sequence: Sequence,
        purpose: Purpose,
        source: PoolState,
        target: PoolState,
        groups: tuple[range, ...],
        tokens: int,
        room: int,
        engine: EngineState | None,
        row: int,
    ) -> Handoff:
        """Hold `room` pages of the target, of which some may have the KV of its first tokens."""
        spans, prefixes = self.spans(source, target), target.prefixes
        there: list[int] = []
        if prefixes is not None:
            most = tokens // spans.tokens * spans.tokens
            there = prefixes.take(keys_of(sequence, prefixes), most)
            kept = len(there) * prefixes.page_size // spans.tokens * spans.tokens
            kept //= prefixes.page_size
            target.allocator.free(there[kept:])  # of a span that is not all there
            del there[kept:]
        self._opened += 1
        handoff = Handoff(
            id=self._opened,
            ref=SequenceRef.of(sequence),
            purpose=purpose,
            source=source,
            target=target,
            engine=engine,
            groups=groups,
            tokens=tokens,
            spans_of=spans,
            target_pages=there + target.allocator.allocate(room - len(there)),
            skipped_tokens=len(there) * target.layout.page_size,
            row=row,
            opened=self._clock.now(),
        )
        handoff.costs.pages_skipped = len(there)
        if engine is not None:
            self._recorder.mark(sequence, "reserved")
        self._recorder.free_pages(target.id, target.allocator.free_pages)
        self._open[handoff.id] = handoff
        self._deadlines.opened(handoff)
        return handoff

    def _on_its_way(self, handoff: Handoff) -> None:
        handoff.departed = self._clock.now()
        self._has_computed(handoff, handoff.tokens)
        self._deadlines.sent()
        self._settle(handoff)

    def _has_computed(self, handoff: Handoff, tokens: int) -> None:
        handoff.has_computed(tokens)
        self._to_send[handoff.id] = handoff

    # How they go on.

    def streaming(self, chunks: Seq[Chunk]) -> list[tuple[Handoff, int]]:
        """The reservations whose KV leaves as a step over `chunks` is computed, and how many tokens
        of each are computed then."""
        return [
            (chunk.sequence.handoff, chunk.stop)
            for chunk in chunks
            if chunk.sequence.handoff is not None
        ]

    def computed(self, chunks: Iterable[Chunk], step: StepTicket) -> None:
        """A step over `chunks` has been dispatched."""
        for index, chunk in enumerate(chunks):
            handoff = chunk.sequence.handoff
            if handoff is not None:
                self._has_computed(handoff, chunk.stop)
                if chunk.last:
                    self.ahead.computing(handoff, step, index)

    def pump(self) -> bool:
        """Send whatever can leave now and has not. Returns whether there was anything."""
        if not self._to_send:
            self.queue.blocked = False
            return False
        to_send, self._to_send = self._to_send, {}
        sent = self.queue.send(list(unsent_of(to_send)))
        if self.queue.blocked:  # else all of it has left, but for what has failed
            self._to_send = to_send | self._to_send
        if sent:
            self._deadlines.sent()
        return sent

    @property
    def sendable(self) -> bool:
        """Whether anything could leave that has not, but for what is on the way already."""
        return bool(self._to_send) and not self.queue.blocked

    def _written(self, handoff: Handoff) -> None:
        self._to_settle[handoff.id] = handoff

    def settle(self) -> None:
        """Let the sequences decode whose KV has been written, all of it."""
        if not self._to_settle:
            return
        handoffs, self._to_settle = self._to_settle, {}
        for _, handoff in sorted(handoffs.items()):
            self._settle(handoff)

    def _settle(self, handoff: Handoff) -> None:
        """Finish a hand-off that is complete and whose sequence waits for nothing else."""
        if handoff.closed or handoff.departed is None:
            return
        arrived = self._clock.now()
        if not handoff.leave_if_complete():
            return
        del self._open[handoff.id]
        sequence, target = handoff.sequence, handoff.target
        prefixes = target.prefixes
        if prefixes is not None:
            sequence.found_in(prefixes, handoff.skipped_tokens)
            prefixes.insert(keys_of(sequence, prefixes), handoff.target_pages, handoff.tokens)
        if handoff.engine is None:
            target.allocator.free(handoff.target_pages)
        else:
            sequence.handoff = None
            self._recorder.mark(sequence, "transfer_landed")
            self._lifecycle.start_decoding(
                sequence, handoff.engine, handoff.row, handoff.target_pages
            )
        handoff.record(arrived, self._recorder)

    # How they go wrong.

    def give_up_room(self, pool: PoolState, pages: int) -> None:
        """Sequences that decode need `pages` more pages of a pool than are free: close the
        reservations that the policy names."""
        reservations = reservations_in(pool, self.open)
        plan = self._policy.withdraw(list(reservations), pages, self._clock.now())
        check_withdrawals(self._policy, plan, reservations)
        for reservation in plan:
            self._withdraw(reservations[reservation])

    def _withdraw(self, handoff: Handoff) -> None:
        """Give up the room of a sequence that is being prefilled, or has ended. One whose row runs
        ahead starts over: what is in flight for it must not be read."""
        if handoff.purpose is Purpose.CACHE:
            handoff.close()
        elif handoff.ahead:
            handoff.sequence.streams = False
            self._lifecycle.preempt(handoff.sequence)
        else:
            handoff.withdraw()

    def expire(self) -> bool:
        """Give up what is overdue, when the timer is due. Returns whether anything was."""
        overdue = self._deadlines.overdue(self.open)
        for handoff in overdue:
            if handoff.departed is None:
                self._withdraw(handoff)
            else:
                error = HandoffTimeout(f"not arrived within {self._config.deadline} s")
                self._failed(handoff, error)
        return bool(overdue)

    def _failed(self, handoff: Handoff, error: BaseException) -> None:
        """An attempt went wrong. What of it is on its way has to be sent again, so that it is one
        attempt, however many jobs it had."""
        if not handoff.wanted:
            return
        if handoff.ahead:
            self._withdraw(handoff)
            return
        handoff.disown()
        self._to_send[handoff.id] = handoff
        handoff.attempts += 1
        self._recorder.transfers.retries += 1
        if handoff.attempts <= self._config.retries:
            return
        sequence = handoff.sequence
        if handoff.purpose is Purpose.CACHE or handoff.departed is None:
            self._withdraw(handoff)  # a sequence that is being prefilled will have another
        elif handoff.purpose is Purpose.MIGRATE:
            self._stay(handoff)
        elif sequence.failed_handoffs < self._config.reprefills:
            sequence.failed_handoffs += 1
            _LOG.warning("%s: prefilled again, its hand-off failed: %s", sequence.id, error)
            self._recorder.transfers.reprefilled_tokens += sequence.length
            self._lifecycle.preempt(sequence)
        else:
            self._lifecycle.fail(sequence, error)

    def _stay(self, handoff: Handoff) -> None:
        """A sequence that was to change engines goes on in the pool where it was, if an engine of
        that has a row."""
        sequence = handoff.sequence
        sequence.streams = False
        able = [each for each in self._fleet.sharing(handoff.source) if each.takes_row]
        if not able:
            self._lifecycle.preempt(sequence)
            return
        pages = handoff.stay()
        sequence.handoff = None
        self._lifecycle.start_decoding(sequence, able[0], able[0].rows.reserve(), pages)

    def _lost(self, handoff: Handoff, error: BaseException) -> None:
        """What had been counted as written was not: every sequence that decodes by it has failed.

        Engines work in order, so that this is seen before a sequence can have gone on to another
        engine with what it has read.
        """
        self._to_send[handoff.id] = handoff
        if not handoff.completed:
            return  # no sequence relied on it, and it is sent again where it is still wanted
        sequence = handoff.sequence
        lose_written(handoff, error, self._lifecycle, self.open)
        self._to_send.update({each.id: each for each in self.open})
        if handoff.purpose is not Purpose.CACHE and not sequence.done:
            self._lifecycle.fail(sequence, error)  # wherever it is: its tokens may be wrong
