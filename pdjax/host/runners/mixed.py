"""Mixed steps: chunks of prompts, and the tick of the rows beside them."""

from pdjax.core.clock import Clock
from pdjax.host.batching.chunks import Chunk
from pdjax.host.batching.prefill_batch import prefill_batch
from pdjax.host.engines import EngineState, InFlight, Mixed
from pdjax.host.runners.decode import DecodeRunner
from pdjax.host.runners.prefill import PrefillRunner, copies_of
from pdjax.host.runners.steps import Steps
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.steps import MixedStep


class MixedRunner:
    """Dispatches and harvests the steps of engines that accept mixed ones.

    Rows are in every step that such an engine is given, and chunks join them (stall-free batching,
    Sarathi-Serve, Agrawal et al. 2024). Where there is only one of both, it is an ordinary step.

    Args:
      prefill, decode: see to the two halves.
      steps: on their way.
      clock: tells the time.
    """

    def __init__(
        self, prefill: PrefillRunner, decode: DecodeRunner, steps: Steps, clock: Clock
    ) -> None:
        self._prefill, self._decode, self._steps = prefill, decode, steps
        self._clock = clock

    def dispatch(self, state: EngineState, chunks: tuple[Chunk, ...]) -> bool:
        """Give an engine a step of a plan's chunks, if there are any, and of its rows. Returns
        whether there was anything to give."""
        # What is planned while no row is active may be more than rows have room beside.
        fits = sum(chunk.tokens for chunk in chunks) <= state.buckets.most_mixed
        ticks = fits and state.can_tick and self._decode.prepare(state)
        chunks = self._prefill.prepare(state, chunks)
        if ticks and chunks:
            self._submit(state, chunks)
        elif ticks:
            self._decode.submit(state)
        elif chunks:
            self._prefill.submit(state, chunks)
        return bool(ticks or chunks)

    def _submit(self, state: EngineState, chunks: tuple[Chunk, ...]) -> None:
        buckets, tick = state.buckets, state.rows.tick(mixed=True)
        batch = prefill_batch(chunks, buckets, buckets.mixed_tokens)
        work = Mixed(chunks, tick)
        self._steps.submit(
            state,
            MixedStep(batch, tick.batch, copies_of(chunks, buckets.page_size)),
            work,
            work.refs,
            tokens=work.tokens,
            sequences=len(work.refs),
            scored=tuple(chunk.scored for chunk in chunks),
        )

    def harvest(self, state: EngineState, done: InFlight[Mixed]) -> list[Sequence]:
        """A step has come back. Returns the sequences that have finished in their rows."""
        work = done.work
        chunks, rows = work.parts(done)
        now = self._clock.now()  # two slices of a trace that begin and end together
        self._decode.record(state, rows, now)
        self._prefill.record(state, chunks, now)
        sampled = self._steps.read(state, done, tokens=work.tokens, sequences=len(work.refs))
        if sampled is None:
            return []
        of_chunks, of_rows = sampled.split(state.buckets.sequences)
        finished = self._decode.take(rows, of_rows)
        self._prefill.take(state, chunks, of_chunks)
        return finished
