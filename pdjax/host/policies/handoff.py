"""Whether KV moves, when and where to; how it moves is in `host/handoff/manager.py`."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from pdjax.config import HandoffConfig
from pdjax.host.batching.buckets import Buckets
from pdjax.host.policies.api import DecodeView, Migration
from pdjax.host.sequences.sequence import Sequence


class HandoffRules:
    """The rules of a config; see `HandoffScheduler`.

    A few tokens on the prefill side before the hand-over hide it, at the price of steps there
    (`after_tokens`); short prompts are decoded where they are, as a request that costs less than
    its hand-off should be (`stay_below`, compare Dynamo's conditional disaggregation).

    Args:
      config: the rules.
      buckets: say how many pages a sequence needs.
    """

    def __init__(self, config: HandoffConfig, buckets: Buckets) -> None:
        self._config, self._buckets = config, buckets

    def stays(self, sequence: Sequence) -> bool:
        """See `HandoffScheduler`."""
        short = sequence.prompt_len < self._config.stay_below
        return short or len(sequence.output) <= self._config.after_tokens

    def streams(self, sequence: Sequence) -> bool:
        """See `HandoffScheduler`. Who writes a single token is never handed over."""
        leaves = self._config.after_tokens == 0 and sequence.prompt_len >= self._config.stay_below
        ends = sequence.max_new_tokens - len(sequence.output) <= 1
        return self._config.streaming and sequence.streams and leaves and not ends

    def gives_back(self, sequence: Sequence) -> bool:
        """See `HandoffScheduler`."""
        del sequence
        return self._config.give_back

    def migrations(
        self, engines: Seq[DecodeView], decoding: Mapping[int, Seq[Sequence]]
    ) -> list[Migration]:
        """See `HandoffScheduler`. From the engine with the most rows taken to the one with the
        fewest, if they differ by two or more: the sequence that is the least to carry."""
        if not self._config.rebalance or len(engines) < 2:
            return []
        taken = {view.engine: view.rows - view.free_rows for view in engines}
        fullest = max(engines, key=lambda view: taken[view.engine])
        emptiest = min(engines, key=lambda view: taken[view.engine])
        able = [
            sequence
            for sequence in decoding[fullest.engine]
            if sequence.streams and self._fits(sequence, emptiest, taken[emptiest.engine])
        ]
        if taken[fullest.engine] - taken[emptiest.engine] < 2 or not able:
            return []
        return [Migration(min(able, key=lambda sequence: sequence.length), emptiest.engine)]

    def _fits(self, sequence: Sequence, view: DecodeView, in_hand: int) -> bool:
        needs = self._buckets.table_pages_for
        return (
            view.free_rows > 0
            and needs(sequence.length) + in_hand <= view.free_pages
            and needs(sequence.lifetime_tokens) <= view.total_pages
        )
