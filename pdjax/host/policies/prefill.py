"""First come, first served prefill: whole prompts or chunks of them, packed up to a budget."""

from collections.abc import Sequence as Seq

from pdjax.host.policies.api import EngineView, PolicySetup, StepPlan
from pdjax.host.policies.check import choose
from pdjax.host.policies.packing import Draft
from pdjax.host.policies.placement import RemotePlacement
from pdjax.host.sequences.sequence import Sequence


class FcfsPrefill:
    """Packs the oldest first, up to the engine's token budget a step (chunked prefill, Agrawal et
    al. 2023). A prompt longer than what is left of the budget is cut, and goes on in the next step.

    What is in the prefix cache of an engine's pool is not computed again there, and of several
    choices all go where most of their prompt is. All pages of a
    sequence are reserved when its first chunk is planned, so that what has begun can always be
    finished. If the first one waiting finds no room, no other overtakes it: what order a subclass
    gives the queue by its `rank`, this is why a wait has a bound. Only where the placement policy
    sends it to some of the engines, others may go to the rest of them.

    A step of newcomers that could hold more of them is put off while another step runs, if all that
    they lack is pages whose KV is on its way elsewhere: a step takes as long for one prompt as for
    several, and it would leave no better room behind for the next.
    """

    def __init__(self, setup: PolicySetup) -> None:
        assert setup.router is not None, "a router chooses the engine of a sequence"
        self._router = setup.router
        self._placement = setup.placement or RemotePlacement()

    def plan(self, waiting: Seq[Sequence], engines: Seq[EngineView], now: float) -> list[StepPlan]:
        """See `PrefillPolicy`."""
        draft = self.draft(engines, now)
        for sequence in waiting:
            if not self.place(sequence, draft) and not draft.passes(sequence):
                break
        return list(draft.plans())

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
        view = choose(self._router, "prefill_engine", sequence, able)
        return draft.admit(sequence, view.engine)
