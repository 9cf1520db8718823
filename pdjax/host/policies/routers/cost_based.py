"""The engine that is predicted to be done first."""

from collections.abc import Sequence as Seq

from pdjax.host.policies.api import EngineView, PolicySetup
from pdjax.host.sequences.sequence import Sequence
from pdjax.host.step_times import StepTimes, prefill_seconds


class CostBased:
    """The engine with the smallest predicted time to first token: what it has to compute already
    and what of this prompt is not in its cache, by the times that its own steps have taken. For
    decode the one whose rows would wait least for each token, this one with them.

    After Mooncake's scheduler (Qin et al., FAST 2025), which adds up the queue's time and that of
    the uncached tokens on each instance, from profiles; here the profile is `EngineView`'s
    `prefill_times`, a line fitted to finished steps. So engines of different sizes, and one that
    has become slow, get what they can do.

    An engine that has finished no step is taken to be as fast as the fastest of the others; where
    none has, tokens and rows are compared.
    """

    def __init__(self, setup: PolicySetup | None = None) -> None:
        del setup

    def prefill_engine(self, sequence: Sequence, engines: Seq[EngineView]) -> EngineView:
        """See `Router`."""
        step = max(view.token_budget for view in engines)
        times = _times([view.prefill_times for view in engines], step)
        costs = []
        for view, its in zip(engines, times, strict=True):
            tokens = view.backlog + sequence.length - view.cached(sequence)
            costs.append(prefill_seconds(its, view.token_budget, tokens) if its else tokens)
        return _least(engines, costs)

    def decode_engine(self, sequence: Sequence, engines: Seq[EngineView]) -> EngineView:
        """See `Router`."""
        rows = [view.rows - view.free_rows + 1 for view in engines]
        times = _times([view.token_times for view in engines], max(rows))
        costs = [
            its.seconds(count) if its else count for its, count in zip(times, rows, strict=True)
        ]
        return _least(engines, costs)


def _times(times: Seq[StepTimes], size: int) -> Seq[StepTimes | None]:
    """Those of each engine: its own, or those of the fastest in a step of that size; None where
    none has any."""
    measured = [each for each in times if each.measured]
    fastest = min(measured, key=lambda each: each.seconds(size) or 0.0, default=None)
    return [each if each.measured else fastest for each in times]


def _least(engines: Seq[EngineView], costs: Seq[float | None]) -> EngineView:
    """The engine of the least cost; among equals the one with most free rows, then pages."""
    ranked = [
        ((cost or 0.0, -view.free_rows, -view.free_pages), index)
        for index, (view, cost) in enumerate(zip(engines, costs, strict=True))
    ]
    return engines[min(ranked)[1]]
