"""Who decodes: the oldest first, in reserved rows and pages. Who gives way when pages run out."""

from collections.abc import Sequence as Seq
from dataclasses import replace

from pdjax.host.batching.buckets import Buckets
from pdjax.host.policies.api import Admission, DecodeView, GrowthPlan, Router
from pdjax.host.sequences.sequence import Sequence


class FcfsDecode:
    """First come, first served, with preemption by recompute (vLLM, Kwon et al. 2023).

    Growing comes before admitting, and when the pool is full the youngest gives way. So the oldest
    sequence of a pool always gets on; and since every prefill, that of a victim too, yields a
    token, nothing is recomputed for ever.

    Args:
      buckets: say how many pages a sequence needs.
      router: chooses the engine of a sequence that is admitted.
    """

    def __init__(self, buckets: Buckets, router: Router) -> None:
        self._buckets = buckets
        self._router = router

    def grow(self, needy: Seq[Sequence], holders: Seq[Sequence], free_pages: int) -> GrowthPlan:
        """See `DecodeScheduler`. One that is itself the youngest gives way to the others."""
        in_turn = sorted(needy, key=_age)
        if len(needy) <= free_pages:  # nearly always: nobody else need be looked at
            return GrowthPlan((), tuple(in_turn))
        victims: list[Sequence] = []
        grown: list[Sequence] = []
        by_age = sorted(holders, key=_age)
        for sequence in in_turn:
            while not free_pages and sequence not in victims:
                victims.append(by_age.pop())
                free_pages += len(victims[-1].pages)
            if sequence not in victims:
                grown.append(sequence)
                free_pages -= 1
        return GrowthPlan(tuple(victims), tuple(grown))

    def admit(self, prefilled: Seq[Sequence], engines: Seq[DecodeView]) -> list[Admission]:
        """See `DecodeScheduler`. If the oldest finds no room, nobody overtakes it."""
        views = {view.engine: view for view in engines}
        admissions = []
        for sequence in prefilled:
            able = [view for view in views.values() if self._can_admit(sequence, view)]
            if not able:
                break
            view = self._router.decode_engine(sequence, able)
            pages = self._pages_to_reserve(sequence, view)
            admissions.append(Admission(sequence, view.engine, pages))
            views[view.engine] = replace(
                view, free_rows=view.free_rows - 1, free_pages=view.free_pages - pages
            )
        return admissions

    def _pages_to_reserve(self, sequence: Sequence, view: DecodeView) -> int:
        return 0 if view.shares_with else self._buckets.table_pages_for(sequence.length)

    def _can_admit(self, sequence: Sequence, view: DecodeView) -> bool:
        if not view.free_rows:
            return False
        if view.shares_with:
            return sequence.engine in view.shares_with
        # A page in hand for everybody who decodes already: else whoever is let in now would be the
        # first to give way at the next growth, his transfer in vain.
        in_hand = view.rows - view.free_rows
        return (
            self._pages_to_reserve(sequence, view) + in_hand <= view.free_pages
            and self._buckets.table_pages_for(sequence.lifetime_tokens) <= view.total_pages
        )


def _age(sequence: Sequence) -> int:
    return sequence.order
