"""The engine that has most of a prompt already, unless it has far more to do than others."""

from collections.abc import Sequence as Seq

from pdjax.host.policies.api import EngineView, PolicySetup
from pdjax.host.policies.router import LeastLoaded
from pdjax.host.sequences.sequence import Sequence


class PrefixAware:
    """The engine whose pool has the longest prefix of the prompt in its cache; among equals, and
    where loads are too unequal, the least loaded one. So does SGLang's cache-aware router (SGLang,
    Zheng et al. 2024, its `cache_aware` policy), and llm-d's by weights of prefix and queue.

    SGLang's router guesses from what it has sent; here the host owns the pools and knows. How
    unequal loads may be say `policies.imbalance_steps` and `policies.imbalance_rows`.
    """

    def __init__(self, setup: PolicySetup) -> None:
        self._config = setup.config.policies
        self._least = LeastLoaded()

    def prefill_engine(self, sequence: Sequence, engines: Seq[EngineView]) -> EngineView:
        """See `Router`. The prefix is what need not be computed."""
        least = min(view.backlog for view in engines)
        near = [
            view
            for view in engines
            if view.backlog - least <= self._config.imbalance_steps * view.buckets.token_budget
        ]
        return self._least.prefill_engine(sequence, _longest(sequence, near))

    def decode_engine(self, sequence: Sequence, engines: Seq[EngineView]) -> EngineView:
        """See `Router`. The prefix is what need not be sent."""
        least = min(map(_taken, engines))
        near = [view for view in engines if _taken(view) - least <= self._config.imbalance_rows]
        return self._least.decode_engine(sequence, _longest(sequence, near))


def _longest(sequence: Sequence, engines: Seq[EngineView]) -> list[EngineView]:
    """The engines with the longest prefix."""
    cached = [view.cached(sequence) for view in engines]
    most = max(cached)
    return [view for view, tokens in zip(engines, cached, strict=True) if tokens == most]


def _taken(view: EngineView) -> float:
    return 1 - view.free_rows / view.rows
