"""Prefill steps in the making: what engines have room for, packed up to the budgets of a step.

A policy says in which order sequences come; the rest is the same for all of them.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from pdjax.core.ids import EngineId
from pdjax.host.batching.chunks import Chunk
from pdjax.host.policies.api import EngineView, PlacementPolicy, PolicySetup, StepPlan
from pdjax.host.policies.check import choose, placed
from pdjax.host.policies.placement import RemotePlacement
from pdjax.host.sequences.sequence import Sequence


@dataclass
class _Step:
    """A step in the making, and what is left of its budgets.

    `decoding` are sequences of the engine that decode there and are not in the step yet, in the
    order of their turn. `kept` places, of one token each, are reserved for them.
    """

    view: EngineView
    tokens: int
    sequences: int
    pages: int  # that it may read, over all its sequences
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
        """As much of a sequence from `start` on as fits; perhaps nothing."""
        most = min(start + self.tokens, self.pages * self.view.buckets.page_size)
        return Chunk(sequence, start, max(start, min(sequence.length, most)))

    def add(self, sequence: Sequence, start: int) -> bool:
        """Add what fits of a sequence; returns whether anything did."""
        chunk = self.next_chunk(sequence, start)
        if not self.has_room or not chunk.tokens:
            return False
        self.chunks.append(chunk)
        self.tokens -= chunk.tokens
        self.sequences -= 1
        self.pages -= self.view.buckets.pages_for(chunk.stop)
        return True


_MOST_PASSED = 32
"""Sequences of the queue that are looked at behind those that find no room: a plan is made many
times a second, and the queue may be long."""


class Draft:
    """A plan in the making: engines as a router sees them, with what they have been given so far,
    and their steps. A step is begun when it is first asked for, since most plans concern one engine
    of many.

    Args:
      engines: as `PrefillPolicy.plan` is given them.
      placement: says which of them may prefill a sequence.
      now: moment of the plan.
    """

    def __init__(self, engines: Seq[EngineView], placement: PlacementPolicy, now: float) -> None:
        self._placement, self._now = placement, now
        # A page in hand for every row of the pool that decodes, see `FcfsDecode`.
        self._views = {
            view.engine: view
            if not view.rows_of_pool
            else replace(view, free_pages=view.free_pages - view.rows_of_pool)
            for view in engines
        }
        self._open = {view.engine for view in engines if view.open}
        self._steps: dict[EngineId, _Step] = {}
        self._waits: set[EngineId] = set()
        self._allowed = set(self._views)  # for the sequence that was asked about last
        self._passed = 0

    def able(self, sequence: Sequence) -> list[EngineView]:
        """The engines that have room for a sequence of the queue, of those that may prefill it."""
        length, lifetime = sequence.length, sequence.lifetime_tokens
        if self._placement.local:
            views = list(self._views.values())
            self._allowed = placed(self._placement, sequence, views, self._now)
        return [
            view
            for engine, view in self._views.items()
            if engine in self._open
            and engine in self._allowed
            and length <= view.free_pages * view.buckets.page_size
            and lifetime <= view.total_pages * view.buckets.page_size
            and self._step_takes(sequence, view)
        ]

    def passes(self, sequence: Sequence) -> bool:
        """Let others of the queue pass a sequence that has found no room, to engines that may not
        prefill it: it waits for none of those. Returns whether there are any."""
        self._open -= self._allowed
        self._passed += 1
        if not self._open or self._passed > _MOST_PASSED:
            return False
        waited = [self._views[engine] for engine in self._allowed]
        if waited:  # it comes before them there
            view = min(waited, key=lambda view: view.backlog)
            tokens = sequence.length - view.cached(sequence)
            self._views[view.engine] = replace(view, backlog=view.backlog + tokens)
        return True

    def _step_takes(self, sequence: Sequence, view: EngineView) -> bool:
        """Whether the budgets of an engine's step let a sequence of the queue begin."""
        if not view.token_budget:
            return False
        if not view.running and view.engine not in self._steps:
            return True  # nothing of the budgets is taken, and any sequence fits into them
        if sequence.failed_steps or any(each.failed_steps for each in view.running):
            return False  # a step that fails takes all that is in it along
        step = self._step(view)
        # Last, since this question alone may cost a walk over the pages of the prompt.
        return step.has_room and step.next_chunk(sequence, view.cached(sequence)).tokens > 0

    def _step(self, view: EngineView) -> _Step:
        step = self._steps.get(view.engine)
        if step is None:
            step = self._steps[view.engine] = _begin(view)
        return step

    def admit(self, sequence: Sequence, engine: EngineId) -> int:
        """Begin a sequence of the queue on an engine that is able; returns the tokens that it
        computes there."""
        view = self._views[engine]
        start, needs = view.cached(sequence), view.buckets.pages_for(sequence.length)
        self._step(view).add(sequence, start)
        if sequence.failed_steps:
            self._step(view).sequences = 0
        for each in list(self._views.values()):
            if each.pool == view.pool:
                given, row = (sequence.length - start, 1) if each is view else (0, 0)
                rows = each.free_rows_of_pool
                self._views[each.engine] = replace(
                    each,
                    backlog=each.backlog + given,
                    free_pages=each.free_pages - needs,
                    free_rows=each.free_rows if each.role.prefills else each.free_rows - row,
                    free_rows_of_pool=rows and rows - 1,
                )
        return sequence.length - start

    def put_off(self, sequence: Sequence) -> None:
        """Let the steps wait for which all that a sequence of the queue lacks to join them is pages
        that hand-offs are about to let go."""
        for engine, step in self._steps.items():
            if engine not in self._allowed:
                continue
            view = self._views[engine]
            needs = view.buckets.pages_for(sequence.length)
            lacks_pages = view.free_pages < needs <= view.free_pages + view.leaving_pages
            busy = view.in_flight > 0 and not view.running
            if busy and lacks_pages and step.has_room:
                self._waits.add(engine)

    def plans(self) -> Iterator[StepPlan]:
        """A step for each engine that has something to compute."""
        for engine, view in self._views.items():
            if not view.open:
                continue
            begun = engine in self._steps and engine not in self._waits
            if begun or view.running:
                step = self._step(view)
                step.let_decode(view.buckets.sequences)
                if step.chunks:
                    yield StepPlan(engine, tuple(step.chunks))


class Packer:
    """Begins sequences of the queue on the engines that a router chooses: what the prefill policies
    have in common."""

    def __init__(self, setup: PolicySetup) -> None:
        assert setup.router is not None, "a router chooses the engine of a sequence"
        self._router = setup.router
        self._placement = setup.placement or RemotePlacement()

    def draft(self, engines: Seq[EngineView], now: float) -> Draft:
        """An empty plan for these engines."""
        return Draft(engines, self._placement, now)

    def place(self, sequence: Sequence, draft: Draft) -> int:
        """Begin a sequence of the queue on the engine that the router chooses of those that are
        able; returns the tokens that it computes there, or 0 where none is able."""
        able = draft.able(sequence)
        if not able:
            draft.put_off(sequence)
            return 0
        if sequence.request.params.n > 1:  # its prompt may have been computed for another choice
            most = max(view.cached(sequence) for view in able)
            able = [view for view in able if view.cached(sequence) == most]
        if sequence.brought_to is not None:
            able = [view for view in able if view.pool == sequence.brought_to] or able
        if sequence.failed_on:
            able = [view for view in able if view.engine not in sequence.failed_on] or able
        view = choose(self._router, "prefill_engine", sequence, able)
        return draft.admit(sequence, view.engine)


def _begin(view: EngineView) -> _Step:
    """A step that goes on with the prompts that have begun.

    Half of its places and tokens are for sequences that decode on the prefill engine, if there are
    so many; of an odd number the larger half in every second step. In those steps they also come
    first, so that neither they nor the prompts can take all pages of every step. What the others
    leave is theirs, too. The one served longest ago comes first, so that each of N is served once
    in `2 * ceil(N / max_sequences)` steps if the pages suffice, and in 2 N steps at the latest.
    """
    buckets, odd = view.buckets, view.steps % 2
    decoding = sorted(filter(_decodes, view.running), key=lambda seq: (seq.served, seq.order))
    half = (min(buckets.sequences, view.token_budget) + odd) // 2
    step = _Step(view, view.token_budget, buckets.sequences, buckets.step_pages[-1], decoding)
    if odd:
        step.let_decode(half)
    else:
        step.keep(min(half, len(decoding)))
    for sequence in view.running:
        if not _decodes(sequence):
            step.add(sequence, sequence.prefilled)
    return step


def _decodes(sequence: Sequence) -> bool:
    """Whether all that is left to compute is its newest token, which was made here."""
    return bool(sequence.output) and sequence.length - sequence.prefilled == 1
