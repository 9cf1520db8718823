"""Whether KV moves, when and where to; how it moves is in `host/handoff/`."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from pdjax.core.ids import EngineId
from pdjax.host.policies.api import EngineView, GiveBack, Migration, PolicySetup, Reservation
from pdjax.host.sequences.sequence import Sequence


class HandoffRules:
    """The rules of a config; see `HandoffPolicy` and `HandoffConfig`.

    A few tokens on the prefill side before the hand-off hide it, at the price of steps there
    (`after_tokens`); short prompts are decoded where they are, as a request that costs less than
    its hand-off should be (`stay_below`, compare Dynamo's conditional disaggregation).
    """

    def __init__(self, setup: PolicySetup) -> None:
        self._config = setup.config.handoff
        self.migrates, self.returns = self._config.rebalance, self._config.give_back

    def stays(self, sequence: Sequence) -> bool:
        """See `HandoffPolicy`."""
        short = sequence.prompt_len < self._config.stay_below
        return short or len(sequence.output) <= self._config.after_tokens

    def streams(self, sequence: Sequence) -> bool:
        """See `HandoffPolicy`. A sequence of a single token is never handed over."""
        leaves = self._config.after_tokens == 0 and sequence.prompt_len >= self._config.stay_below
        ends = sequence.max_new_tokens - len(sequence.output) <= 1
        return self._config.streaming and sequence.streams and leaves and not ends

    def gives_back(self, move: GiveBack) -> bool:
        """See `HandoffPolicy`. At most half of the free pages are used for that."""
        return self._config.give_back and move.pages <= move.free_pages // 2

    def withdraw(self, reservations: Seq[Reservation], pages: int, now: float) -> Seq[Reservation]:
        """See `HandoffPolicy`. All of them: a sequence that decodes needs its page now, and one
        that is still being prefilled is handed over when its prefill has ended."""
        return reservations

    def migrations(
        self,
        engines: Seq[EngineView],
        decoding: Mapping[EngineId, Seq[Sequence]],
        prefilled: Seq[Sequence],
        migrating: int,
        now: float,
    ) -> list[Migration]:
        """See `HandoffPolicy`. From the engine with the most rows taken to the one with the fewest,
        if they differ by two or more: the sequence with the least KV, one at a time."""
        if not self._config.rebalance or prefilled or migrating or len(engines) < 2:
            return []
        taken = {view.engine: view.rows - view.free_rows for view in engines}
        fullest = max(engines, key=lambda view: taken[view.engine])
        emptiest = min(engines, key=lambda view: taken[view.engine])
        if taken[fullest.engine] - taken[emptiest.engine] < 2:
            return []
        able = [
            sequence
            for sequence in decoding[fullest.engine]
            if sequence.streams and _fits(sequence, fullest, emptiest)
        ]
        if not able:
            return []
        return [Migration(min(able, key=lambda sequence: sequence.length), emptiest.engine)]


def _fits(sequence: Sequence, source: EngineView, target: EngineView) -> bool:
    needs = target.buckets.pages_for
    return (
        target.free_rows > 0
        and source.pool != target.pool
        and source.pool in target.sources
        and needs(sequence.length) + target.rows_of_pool <= target.free_pages
        and needs(sequence.lifetime_tokens) <= target.total_pages
    )
