"""The better of two engines drawn at random."""

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq

from pdjax.host.policies.api import EngineView, PolicySetup
from pdjax.host.policies.router import LeastLoaded
from pdjax.host.sequences.sequence import Sequence


class PowerOfTwo:
    """The less loaded of two engines drawn at random (the power of two choices, Mitzenmacher 1996;
    SGLang's router has it as `power_of_two`). It asks two engines for their load instead of all,
    and does not send everybody to the one that looked emptiest when the loads were last known.

    Chance is a function of the config's seed and the sequence: the same run twice gives the same
    choices, and nothing is remembered.
    """

    def __init__(self, setup: PolicySetup) -> None:
        self._seed = setup.config.seed
        self._least = LeastLoaded()

    def prefill_engine(self, sequence: Sequence, engines: Seq[EngineView]) -> EngineView:
        """See `Router`; load is that of `LeastLoaded`."""
        return self._better("prefill", sequence, engines, self._least.prefill_engine)

    def decode_engine(self, sequence: Sequence, engines: Seq[EngineView]) -> EngineView:
        """See `Router`; load is that of `LeastLoaded`."""
        return self._better("decode", sequence, engines, self._least.decode_engine)

    def _better(
        self,
        side: str,
        sequence: Sequence,
        engines: Seq[EngineView],
        least: Callable[[Sequence, Seq[EngineView]], EngineView],
    ) -> EngineView:
        if len(engines) <= 2:
            return least(sequence, engines)
        # Of a sequence that is preempted the next draw is another.
        chance = random.Random(f"{self._seed} {side} {sequence.order} {sequence.epoch}")
        return least(sequence, chance.sample(engines, 2))
