"""Which sequences decode: the oldest first, in reserved rows and pages. Which give way when pages
run out."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace

from pdjax.host.policies.api import Admission, EngineView, GrowthPlan, PolicySetup
from pdjax.host.policies.check import choose
from pdjax.host.policies.victims import VICTIMS
from pdjax.host.sequences.sequence import Sequence


class FcfsDecode:
    """First come, first served, with preemption by recompute (vLLM, Kwon et al. 2023).

    Growing comes before admitting. When the pool is full `policies.victim` chooses the sequence
    that gives way, by default the youngest, so that the oldest of a pool always gets on. Every
    prefill yields a token, that of a victim too, so that no sequence is recomputed for ever.

    With `policies.tpot_target` a row is taken only while tokens are predicted to come no further
    apart than that with it, by what the engine's ticks have taken; an empty engine always takes
    one. So the first one that waits is admitted at the latest when all rows of an engine have come
    to their ends.
    """

    def __init__(self, setup: PolicySetup) -> None:
        assert setup.router is not None, "a router chooses the engine of a sequence"
        self._router = setup.router
        self._gives_way = VICTIMS[setup.config.policies.victim]
        self._tpot = setup.config.policies.tpot_target

    def grow(
        self, needing: Seq[Sequence], holders: Seq[Sequence], free_pages: int, now: float
    ) -> GrowthPlan:
        """See `DecodePolicy`. A sequence that is itself the first victim gives way to the
        others."""
        in_turn = sorted(needing, key=self._gives_way)
        if len(needing) <= free_pages:  # nearly always: no other sequence need be looked at
            return GrowthPlan((), tuple(in_turn))
        victims: list[Sequence] = []
        grown: list[Sequence] = []
        in_order = sorted(holders, key=self._gives_way)
        for sequence in in_turn:
            while not free_pages and sequence not in victims:
                victims.append(in_order.pop())
                free_pages += len(victims[-1].pages)
            if sequence not in victims:
                grown.append(sequence)
                free_pages -= 1
        return GrowthPlan(tuple(victims), tuple(grown))

    def admit(
        self, prefilled: Seq[Sequence], engines: Seq[EngineView], now: float
    ) -> list[Admission]:
        """See `DecodePolicy`. A sequence stays in its pool, where nothing has to move, if an engine
        of that has a row. If the oldest finds no room, only those overtake it that stay: they hold
        their pages until they have decoded, and it may be these that it waits for."""
        views = {view.engine: view for view in engines}
        admissions, room = [], True
        for sequence in prefilled:
            able = _able(sequence, filter(self._keeps_pace, views.values()))
            here = [view for view in able if view.pool == sequence.pool]
            room = room and bool(able)
            if not (room or here):
                continue
            view = choose(self._router, "decode_engine", sequence, here or able)
            admissions.append(Admission(sequence, view.engine))
            if sequence is prefilled[-1]:
                break
            views[view.engine] = replace(
                view,
                free_rows=view.free_rows - 1,
                free_pages=view.free_pages - _pages_to_reserve(sequence, view),
                rows_of_pool=view.rows_of_pool + 1,
            )
        return admissions

    def _keeps_pace(self, view: EngineView) -> bool:
        """Whether an engine is predicted to keep the wanted time between tokens with a row more."""
        taken = view.rows - view.free_rows
        if self._tpot is None or not taken:
            return True
        predicted = view.token_times.seconds(taken + 1)
        return predicted is None or predicted <= self._tpot

    def admit_ahead(
        self,
        streaming: Seq[Sequence],
        prefilled: Seq[Sequence],
        engines: Seq[EngineView],
        now: float,
    ) -> list[Admission]:
        """See `DecodePolicy`. Room is for those first whose prefill has ended, and no KV leaves
        ahead while an engine of its own pool has a row."""
        pool = streaming[0].pool
        here = [view for view in engines if view.pool == pool]
        if prefilled or any(view.free_rows for view in here):
            return []
        if here:
            engines = [view for view in engines if view.pool != pool]
        return self.admit(streaming, engines, now)


def _pages_to_reserve(sequence: Sequence, view: EngineView) -> int:
    """A sequence brings its pages where its pool is that of the engine."""
    return 0 if view.pool == sequence.pool else view.buckets.pages_for(sequence.length)


def _able(sequence: Sequence, engines: Iterable[EngineView]) -> list[EngineView]:
    """The engines that have room for a sequence."""
    pool, length, lifetime = sequence.pool, sequence.length, sequence.lifetime_tokens
    # A page in hand for every row that decodes already: else the sequence that is admitted now
    # would be the first to give way at the next growth, and its transfer would be in vain.
    return [
        view
        for view in engines
        if view.free_rows
        and pool in view.sources
        and (
            view.pool == pool
            or (
                length <= (view.free_pages - view.rows_of_pool) * view.buckets.page_size
                and lifetime <= view.total_pages * view.buckets.page_size
            )
        )
    ]
