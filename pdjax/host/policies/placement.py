"""Where a sequence is prefilled: on an engine that is for prefill, or beside the rows of the one
where it will decode."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from math import inf

from pdjax.host.policies.api import EngineView, PolicySetup
from pdjax.host.sequences.sequence import Sequence
from pdjax.host.step_times import StepTimes, prefill_seconds


class RemotePlacement:
    """Every prompt goes to the engines that are for prefill, as in DistServe (Zhong et al., OSDI
    2024), and each step of chunks and rows has as many chunks as `prefill.mixed_budget` lets in."""

    local = False

    def __init__(self, setup: PolicySetup | None = None) -> None:
        del setup

    def engines_for(
        self, sequence: Sequence, engines: Seq[EngineView], now: float
    ) -> Seq[EngineView]:
        """See `PlacementPolicy`."""
        return [view for view in engines if view.role.prefills]

    def mixed_tokens(self, view: EngineView) -> int:
        """See `PlacementPolicy`."""
        return view.buckets.most_mixed


class ConditionalPlacement:
    """A prompt is prefilled on an engine that is for decode, with no hand-off, if little of it has
    to be computed there (`policies.local_tokens`), or if the engines that are for prefill are
    predicted to give it its first token later. Such are the policies of Dynamo's conditional
    disaggregation (`isl_or_load`), which goes by a bound on the load; here both sides are predicted
    by what their own steps have taken, as the load of a Mooncake instance is (Qin et al., FAST
    2025).

    Chunks join the rows of an engine for as many tokens as keep the wanted time between tokens:
    `policies.tpot_target`, or the least that a row asks for by its `slo`. A step is predicted to
    take what a tick of its rows takes and what chunks have added to ticks. So TaiChi's knob, the
    chunk size of each instance (Wang et al. 2025), turns by itself. An engine whose rows leave no
    time gets no new prompt; one that it has begun goes on by the smallest mixed step, so that it
    ends.

    Attributes:
      late: how many times as long the time to first token must be on the prefill side. Predictions
        are rough, and a prompt beside rows costs each of them time.
    """

    local = True
    late: float = 1.25

    def __init__(self, setup: PolicySetup) -> None:
        policies = setup.config.policies
        self._short, self._tpot = policies.local_tokens, policies.tpot_target

    def engines_for(
        self, sequence: Sequence, engines: Seq[EngineView], now: float
    ) -> Seq[EngineView]:
        """See `PlacementPolicy`. An engine that is for decode must have a row and pages for the
        sequence, and time for its chunks."""
        views = [view for view in engines if view.takes_prompts and _could_hold(sequence, view)]
        remote = [view for view in views if view.role.prefills]
        if not remote:
            return views
        able = [view for view in views if not view.role.prefills and _has_room(sequence, view)]
        paced = [(view, tokens) for view in able if (tokens := self._tokens_a_step(view)) > 0]
        short = [view for view, tokens in paced if self._is_short(sequence, view, tokens)]
        if short or not paced:
            return short or remote
        fastest = _fastest(remote)
        soonest = min(_ttft(sequence, view, fastest) for view in remote)
        sooner = [
            view
            for view, tokens in paced
            if self.late * _ttft_beside_rows(sequence, view, tokens, fastest) < soonest
        ]
        return sooner or remote

    def mixed_tokens(self, view: EngineView) -> int:
        """See `PlacementPolicy`."""
        tokens = self._tokens_a_step(view)
        return max(tokens, _least(view)) if view.running else tokens

    def _is_short(self, sequence: Sequence, view: EngineView, tokens: int) -> bool:
        """Whether so little is to compute that its first token comes with the next steps, of so
        many tokens each."""
        uncached = sequence.length - view.cached(sequence)
        return uncached <= self._short and tokens >= min(uncached, _least(view))

    def _tokens_a_step(self, view: EngineView) -> int:
        """Prompt tokens that keep the wanted time between the tokens of an engine's rows."""
        most, rows = view.buckets.most_mixed, view.rows - view.free_rows
        wanted = [each for each in (self._tpot, view.tpot) if each is not None]
        tick = view.tick_times.seconds(rows)
        if not (rows and wanted) or tick is None:
            return most
        left = min(wanted) - tick
        if left <= 0:
            return 0
        if not view.chunk_times.measured:  # the smallest of them shows what chunks take
            return _least(view)
        return int(min(most, view.chunk_times.within(left)))


def _least(view: EngineView) -> int:
    """Prompt tokens of the smallest mixed step: fewer are padded to it."""
    return min(view.buckets.mixed_tokens, default=0)


def _could_hold(sequence: Sequence, view: EngineView) -> bool:
    """Whether an empty pool holds all that a sequence may come to need."""
    return sequence.lifetime_tokens <= view.total_pages * view.buckets.page_size


def _has_room(sequence: Sequence, view: EngineView) -> bool:
    """Whether there is a row beside those for the prompts that have begun, and pages with one in
    hand for every row that decodes."""
    return (
        view.free_rows > len(view.running)
        and sequence.length <= (view.free_pages - view.rows_of_pool) * view.buckets.page_size
    )


def _to_compute(sequence: Sequence, view: EngineView) -> int:
    """Prompt tokens until the sequence's first token, of those before it, too."""
    return view.backlog + sequence.length - view.cached(sequence)


def _fastest(engines: Iterable[EngineView]) -> StepTimes | None:
    """The times of the engine whose whole steps are fastest for their size, of those measured."""
    measured = [view for view in engines if view.prefill_times.measured]

    def each(view: EngineView) -> float:
        return (view.prefill_times.seconds(view.token_budget) or 0.0) / view.token_budget

    return min(measured, key=each).prefill_times if measured else None


def _ttft(sequence: Sequence, view: EngineView, fastest: StepTimes | None) -> float:
    """Seconds until the first token on an engine that is for prefill; one that has not been
    measured is taken to be as fast as the fastest. 0 where none has been."""
    times = view.prefill_times if view.prefill_times.measured else fastest
    if times is None:
        return 0.0
    return prefill_seconds(times, view.buckets.token_budget, _to_compute(sequence, view)) or 0.0


def _ttft_beside_rows(
    sequence: Sequence, view: EngineView, tokens: int, fastest: StepTimes | None
) -> float:
    """Seconds until the first token on an engine that is for decode, in steps of so many prompt
    tokens. Until chunks have been measured there, they are taken to cost what steps do on the
    prefill side, or their share of those where all of them are larger and alike."""
    rows, compute = view.rows - view.free_rows, _to_compute(sequence, view)
    tick = view.tick_times.seconds(rows) if rows else 0.0
    own = view.chunk_times if rows else view.prefill_times
    times = own if own.measured else fastest
    if tick is None or times is None:
        return inf
    base, each = times.line() if own.measured or times.knows(tokens) else (0.0, times.each)
    return -(-compute // tokens) * (tick + base) + compute * each
