"""Prefill steps: the sequences that join, what leaves while a step runs, and what comes back."""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from functools import partial

import numpy as np

from pdjax.host.batching.chunks import Chunk
from pdjax.host.batching.prefill_batch import prefill_batch
from pdjax.host.engines import EngineState, InFlight
from pdjax.host.fleet import Fleet
from pdjax.host.handoff.manager import HandoffManager
from pdjax.host.pinning import Pinning
from pdjax.host.policies.api import Policies
from pdjax.host.policies.check import agrees, check_admissions
from pdjax.host.runners.steps import Steps
from pdjax.host.runtime import Runtime
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.sequences.output import OutputProcessor
from pdjax.host.sequences.prompt_scores import of_each
from pdjax.host.sequences.reference import SequenceRef, ids_of
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.interfaces.batches import NOT_FINITE, Sampled
from pdjax.interfaces.steps import Copies, PrefillStep


class PrefillRunner:
    """Dispatches and harvests prefill steps.

    Args:
      fleet: the engines.
      steps: on their way.
      lifecycle, handoffs: move sequences, and their KV.
      output: gives sequences their tokens.
      pinning: is told of prompts that have been computed.
      policies: say which sequences get room ahead, and which stay.
      runtime: clock and recorder.

    Attributes:
      has_firsts: whether a sequence has had its first token since it was last set to False.
    """

    def __init__(
        self,
        fleet: Fleet,
        steps: Steps,
        lifecycle: SequenceLifecycle,
        handoffs: HandoffManager,
        output: OutputProcessor,
        pinning: Pinning,
        policies: Policies,
        runtime: Runtime,
    ) -> None:
        self._fleet, self._steps, self._lifecycle = fleet, steps, lifecycle
        self._handoffs, self._output, self._policies = handoffs, output, policies
        self._clock, self._recorder = runtime.clock, runtime.recorder
        self._pinning = pinning
        self.has_firsts = False

    def dispatch(self, state: EngineState, chunks: tuple[Chunk, ...]) -> None:
        """Dispatch a step over the chunks of a plan that are still possible. KV of sequences that
        have room on the decode side leaves as the step runs."""
        if chunks := self.prepare(state, chunks):
            self.submit(state, chunks)

    def prepare(self, state: EngineState, chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
        """The chunks of a plan that are still possible: pages are theirs, and they are on their way
        from now on."""
        chunks = tuple(self._possible(state, chunks))
        if not chunks:
            return ()
        newcomers = [chunk for chunk in chunks if chunk.sequence.state is State.WAITING]
        self._lifecycle.start_prefill(
            state,
            [
                (chunk.sequence, chunk.start, state.buckets.pages_for(chunk.sequence.length))
                for chunk in newcomers
            ],
        )
        for chunk in newcomers:
            self._recorder.mark(chunk.sequence, "prefill_started")
        self._recorder.free_pages(state.pool.id, state.allocator.free_pages)
        state.steps += 1
        for chunk in chunks:
            chunk.sequence.prefilled, chunk.sequence.served = chunk.stop, state.steps
        self._reserve_ahead(state, chunks)
        return chunks

    def submit(self, state: EngineState, chunks: tuple[Chunk, ...]) -> None:
        """Give an engine a step of chunks that are prepared."""
        batch, started = prefill_batch(chunks, state.buckets), self._clock.now()
        streaming, queue = self._handoffs.streaming(chunks), self._handoffs.queue
        exports = queue.exports(streaming, len(state.engine.layer_groups)) if streaming else ()
        ticket = self._steps.submit(
            state,
            PrefillStep(batch, exports, copies_of(chunks, state.buckets.page_size)),
            chunks,
            tuple(SequenceRef.of(chunk.sequence) for chunk in chunks),
            tokens=_tokens(chunks),
            sequences=len(chunks),
            started=started,
            scored=tuple(chunk.scored for chunk in chunks),
            on_error=partial(queue.dropped, exports),
        )
        if ticket is not None:
            queue.dispatched(ticket.exports)
            self._handoffs.computed(chunks, ticket)

    def _possible(self, state: EngineState, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The chunks that are still as their plan found them; the next plan sees to the others.

        Other plans of the same time are carried out before: in a pool that engines share, they may
        have taken free pages, or evicted cached ones.
        """
        free, prefixes = state.allocator.free_pages, state.pool.prefixes
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.state is State.WAITING:
                known = prefixes.known_tokens(sequence, chunk.start) if prefixes is not None else 0
                needs = state.buckets.pages_for(sequence.length)
                if known < chunk.start or needs > free:
                    continue
                free -= needs
            elif (
                sequence.state is not State.PREFILLING
                or sequence.engine != state.id
                or sequence.prefilled != chunk.start
            ):
                continue
            yield chunk

    def _reserve_ahead(self, state: EngineState, chunks: Iterable[Chunk]) -> None:
        """Find room for the sequences whose KV may leave while it is being computed."""
        policies = self._policies
        streaming = [
            chunk.sequence
            for chunk in chunks
            if chunk.sequence.handoff is None
            and agrees(policies.handoff, "streams", chunk.sequence)
        ]
        if not streaming:
            return
        pool, fleet = state.pool.id, self._fleet
        views = [view for view in fleet.views(fleet.for_rows) if pool in view.sources]
        elsewhere = [view for view in views if view.pool != pool]
        if not elsewhere:
            return
        prefilled, now = self._lifecycle.prefilled, self._clock.now()
        plan = policies.decode.admit_ahead(streaming, prefilled, views, now)
        check_admissions(policies.decode, plan, streaming, elsewhere)
        for admission in plan:
            target = fleet.engines[admission.engine]
            if self._handoffs.fits(admission.sequence, target):
                self._handoffs.reserve(admission.sequence, target)

    def harvest(self, state: EngineState, done: InFlight[tuple[Chunk, ...]]) -> None:
        """A step has come back: each sequence that is prefilled by it has its next token."""
        self.record(state, done, self._clock.now())
        tokens, sequences = _tokens(done.work), len(done.work)
        sampled = self._steps.read(state, done, tokens=tokens, sequences=sequences)
        if sampled is not None:
            self.take(state, done, sampled)

    def record(self, state: EngineState, done: InFlight[tuple[Chunk, ...]], now: float) -> None:
        """Note a step that has come back now."""
        self._recorder.span(
            state.id,
            "step",
            done.started,
            now,
            tokens=_tokens(done.work),
            sequences=len(done.work),
            who=ids_of(done.refs),
            number=done.number,
        )

    def take(self, state: EngineState, done: InFlight[tuple[Chunk, ...]], sampled: Sampled) -> None:
        """Give the sequences of a step what it has computed of them."""
        told = of_each(sampled.scores, done.scored)
        for row, (chunk, ref, scores) in enumerate(zip(done.work, done.refs, told, strict=True)):
            if not ref.is_current:
                continue
            sequence = chunk.sequence
            finite = scores is None or bool(np.isfinite(scores.chosen).all())
            if sampled.tokens[row] == NOT_FINITE or not finite:  # nor is what the chunk has written
                self._lifecycle.fail_not_finite(sequence)
                continue
            if scores is not None and sequence.prompt_scores is not None:
                sequence.prompt_scores.add(scores)
            self._lifecycle.computed(sequence, chunk.stop)
            sequence.copied_from = None
            if not chunk.last:
                continue
            if not sequence.output:
                self._pinning.prefilled(sequence)
                self._recorder.mark(sequence, "first_token")
                self.has_firsts = True
            self._output.accept([(row, ref)], sampled)
            if sequence.done or sequence.tokens_left <= 0:  # it ends when its form is asked
                continue
            ahead = sequence.handoff is not None and sequence.handoff.ahead
            if ahead or not self._stays(sequence, state):
                self._lifecycle.wait_for_decode(sequence)
                if sequence.handoff is not None:
                    self._handoffs.depart(sequence)

    def _stays(self, sequence: Sequence, state: EngineState) -> bool:
        """Whether its next token is made here, too, and there is room for that."""
        if not (state.takes_prompts and agrees(self._policies.handoff, "stays", sequence)):
            return False
        missing = state.buckets.pages_for(sequence.length) - len(sequence.pages)
        if missing > state.allocator.free_pages:
            return False
        sequence.pages += state.allocator.allocate(missing)
        return True


def copies_of(chunks: Seq[Chunk], page_size: int) -> Copies:
    """The pages that are copied for the sequences of a step, which begin within one."""
    found: list[tuple[int, int]] = []
    for chunk in chunks:
        sequence = chunk.sequence
        if sequence.copied is not None:
            found.append((sequence.copied, sequence.pages[chunk.start // page_size]))
            sequence.copied, sequence.copied_from = None, sequence.copied
    return tuple(found)


def _tokens(chunks: Seq[Chunk]) -> int:
    return sum(chunk.tokens for chunk in chunks)
