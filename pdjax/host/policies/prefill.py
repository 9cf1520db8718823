"""First come, first served prefill: whole prompts or chunks of them, packed up to a budget."""

from collections.abc import Sequence as Seq

from pdjax.host.policies.api import EngineView, StepPlan
from pdjax.host.policies.packing import Packer
from pdjax.host.sequences.sequence import Sequence


class FcfsPrefill(Packer):
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

    def plan(self, waiting: Seq[Sequence], engines: Seq[EngineView], now: float) -> list[StepPlan]:
        """See `PrefillPolicy`."""
        draft = self.draft(engines, now)
        for sequence in waiting:
            if not self.place(sequence, draft) and not draft.passes(sequence):
                break
        return list(draft.plans())
