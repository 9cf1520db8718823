"""First come, first served prefill: whole prompts or chunks of them, packed up to a budget."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.chunks import Chunk
from pdjax.host.policies.api import PrefillPlan, PrefillView, Router
from pdjax.host.sequences.sequence import Sequence


@dataclass
class _Step:
    """A step in the making, and what is left of its budgets.

    `decoding` are sequences of the engine that decode there and are not in the step yet, in the
    order of their turn; `kept` places, of one token each, are for them alone.
    """

    view: PrefillView
    tokens: int
    sequences: int
    pages: int  # that it may read, over all its sequences
    page_size: int
    decoding: list[Sequence]
    kept: int = 0
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def has_room(self) -> bool:
        return self.tokens > 0 and self.sequences > 0

    def keep(self, places: int) -> None:
        """Keep places for `decoding`."""
        self.kept = places
        self.tokens -= places
        self.sequences -= places

    def let_decode(self, most: int) -> None:
        """Add up to `most` of `decoding`, also in the places that were kept."""
        self.tokens += self.kept
        self.sequences += self.kept
        self.kept = 0
        turn, self.decoding = self.decoding, []
        for sequence in turn:
            if most <= 0 or not self.add(sequence, sequence.prefilled):
                self.decoding.append(sequence)
            else:
                most -= 1

    def next_chunk(self, sequence: Sequence, start: int) -> Chunk:
        """As much of `sequence` from `start` on as fits; perhaps nothing."""
        stop = min(sequence.length, start + self.tokens, self.pages * self.page_size)
        return Chunk(sequence, start, max(start, stop))

    def add(self, sequence: Sequence, start: int) -> bool:
        """Add what fits of a sequence; returns whether anything did."""
        chunk = self.next_chunk(sequence, start)
        if not self.has_room or not chunk.tokens:
            return False
        self.chunks.append(chunk)
        self.tokens -= chunk.tokens
        self.sequences -= 1
        self.pages -= -(-chunk.stop // self.page_size)
        return True


class FcfsPrefill:
    """Packs the oldest first, up to `token_budget` tokens a step (chunked prefill, Agrawal et al.
    2023). A prompt longer than what is left of the budget is cut, and goes on in the next step.

    What is in the prefix cache of an engine is not computed again there. All pages of a sequence
    are reserved when its first chunk is planned, so that what has begun can always be finished. If
    the oldest one waiting finds no room, nobody overtakes it.

    Args:
      buckets: bound the sequences and the pages of a step.
      token_budget: most tokens of a step.
      router: chooses the engine of a sequence that is admitted.
    """

    def __init__(self, buckets: Buckets, token_budget: int, router: Router) -> None:
        self._buckets = buckets
        self._token_budget = token_budget
        self._router = router

    def plan(self, waiting: Seq[Sequence], engines: Seq[PrefillView]) -> list[PrefillPlan]:
        """See `PrefillScheduler`."""
        steps = {view.engine: self._begin(view) for view in engines if view.open}
        for sequence in waiting:
            pages = self._buckets.pages_for(sequence.length)
            able = [step.view for step in steps.values() if self._can_admit(sequence, pages, step)]
            if not able:
                break
            step = steps[self._router.prefill_engine(sequence, able).engine]
            start = step.view.cached(sequence)
            step.add(sequence, start)
            step.view = replace(
                step.view,
                free_pages=step.view.free_pages - pages,
                backlog=step.view.backlog + sequence.length - start,
            )
        for step in steps.values():
            step.let_decode(self._buckets.sequences)
        return [PrefillPlan(e, tuple(step.chunks)) for e, step in steps.items() if step.chunks]

    def _begin(self, view: PrefillView) -> _Step:
        """A step that goes on with the prompts that have begun.

        Half of its places and tokens are for sequences that decode on the prefill engine, if there
        are so many; of an odd number the larger half in every second step. In those steps they also
        come first, so that neither they nor the prompts can take all pages of every step. What the
        others leave is theirs, too. The one served longest ago comes first, so that each of N is
        served once in `2 * ceil(N / max_sequences)` steps if the pages suffice, and in 2 N steps
        at the latest.
        """
        buckets, odd = self._buckets, view.steps % 2
        decoding = sorted(filter(_decodes, view.running), key=lambda seq: (seq.served, seq.order))
        half = (min(buckets.sequences, self._token_budget) + odd) // 2
        step = _Step(
            view,
            self._token_budget,
            buckets.sequences,
            buckets.step_pages[-1],
            buckets.page_size,
            decoding,
        )
        if odd:
            step.let_decode(half)
        else:
            step.keep(min(half, len(decoding)))
        for sequence in view.running:
            if not _decodes(sequence):
                step.add(sequence, sequence.prefilled)
        return step

    def _can_admit(self, sequence: Sequence, pages: int, step: _Step) -> bool:
        return (
            step.has_room
            and pages <= step.view.free_pages
            and self._buckets.pages_for(sequence.lifetime_tokens) <= step.view.total_pages
            # Last, since this question alone may cost a walk over the pages of the prompt.
            and step.next_chunk(sequence, step.view.cached(sequence)).tokens > 0
        )


def _decodes(sequence: Sequence) -> bool:
    """Whether all that is left to compute is its newest token, which was made here."""
    return bool(sequence.output) and sequence.length - sequence.prefilled == 1
