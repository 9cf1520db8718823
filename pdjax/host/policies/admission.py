"""Which requests are refused early: none, or those that would be late anyway."""

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from heapq import heapify, heappop, heappush
from math import inf

from pdjax.host.policies.api import AskAgain, EngineView, PolicySetup, Shed
from pdjax.host.sequences.queue import SequenceQueue
from pdjax.host.sequences.sequence import Sequence
from pdjax.host.step_times import prefill_seconds

Choices = tuple[Sequence, ...]
"""The choices of a request that wait: all are refused together, or none is. It may be the first one
alone, for which the others are held."""

_AT_ONCE = 64
"""Requests, of those let in while nothing had been measured, that are judged in one turn."""

_SOON_S = 1e-3
"""Seconds until the next of them are."""

_MOST_GONE = 1000
"""Deadlines of requests that can't be refused any more that are kept before they are dropped."""


class AdmitAll:
    """No request is shed: each waits for as long as it takes."""

    sheds = False

    def __init__(self, setup: PolicySetup | None = None) -> None:
        del setup

    def shed(
        self,
        arrived: Seq[Sequence],
        waiting: SequenceQueue,
        prefill: Seq[EngineView],
        decode: Seq[EngineView],
        now: float,
    ) -> list[Shed | AskAgain]:
        """See `AdmissionPolicy`."""
        return []


class EarlyRejection:
    """Refuses a request as it comes if its first token is predicted later than its SLO or its
    deadline allow, or its tokens further apart; and one whose deadline passes while it waits (early
    rejection by prediction, Mooncake, Qin et al., FAST 2025). So no engine computes tokens that
    come too late to be of use, and requests that are let in are on time.

    The time to first token is predicted from what engines have measured of themselves: all that is
    queued before it and in the backlogs, at the rate of all engines together, then its own prompt,
    without what is cached. While no engine has finished a step, all are let in; those of them that
    still wait when one has are judged then, the oldest first. A request without a deadline or SLO
    is never refused, nor is one of which a choice has begun.

    The policy remembers the deadlines of what it has let in, so that it need not look at the whole
    queue.
    """

    sheds = True

    def __init__(self, setup: PolicySetup | None = None) -> None:
        del setup
        self._deadlines: list[tuple[float, int, Choices]] = []  # a heap
        self._overdue: list[Choices] = []  # were being prefilled when their deadlines passed
        self._unjudged: deque[Choices] = deque()  # the oldest first
        self._prune_at = _MOST_GONE

    def shed(
        self,
        arrived: Seq[Sequence],
        waiting: SequenceQueue,
        prefill: Seq[EngineView],
        decode: Seq[EngineView],
        now: float,
    ) -> list[Shed | AskAgain]:
        """See `AdmissionPolicy`. Of a request one choice is named."""
        new = _requests(arrived)
        self._note_deadlines(new)
        late = self._late(waiting, now)
        rate, backlog = _tokens_a_second(prefill), sum(view.backlog for view in prefill)
        paced = [view for view in decode if view.token_times.measured]
        old = self._unjudged_before(waiting, rate, paced)
        self._unjudged += [each for each in new if not _is_known(each, rate, paced)]
        looked_at = {id(each): each for each in (*late, *old, *new)}
        overdue, ahead = set(map(id, late)), dict.fromkeys(looked_at, 0)
        plan, refused, spared = list[Shed | AskAgain](), set[int](), 0
        for before, _, key, sequence in _by_place(looked_at, waiting):
            if key not in refused:
                queue = (backlog + before - spared) / rate if rate else None
                shed = _too_late(sequence) if key in overdue else None
                shed = shed or _too_slow(sequence, prefill, queue, now)
                shed = shed or _too_far_apart(sequence, paced)
                if shed is None:
                    ahead[key] += sequence.length
                    continue
                plan.append(shed)
                refused.add(key)
                spared += ahead[key]
            spared += sequence.length  # of all choices: it is not in the way of the next
        return [*plan, *self._ask_again(rate, paced, now)]

    def _note_deadlines(self, new: Iterable[Choices]) -> None:
        for choices in new:
            request = choices[0].request
            if request.deadline is not None:
                due = request.arrival + request.deadline
                heappush(self._deadlines, (due, choices[0].order, choices))
        if len(self._deadlines) > self._prune_at:
            self._deadlines = [each for each in self._deadlines if not _is_safe(each[-1])]
            heapify(self._deadlines)
            self._prune_at = 2 * len(self._deadlines) + _MOST_GONE

    def _late(self, waiting: SequenceQueue, now: float) -> list[Choices]:
        """The requests that wait and whose deadlines have passed."""
        overdue, deadlines = self._overdue, self._deadlines
        while deadlines and deadlines[0][0] <= now:
            overdue.append(heappop(deadlines)[-1])
        self._overdue = [each for each in overdue if not _is_safe(each)]
        return [each for each in self._overdue if _all_wait(each, waiting)]

    def _unjudged_before(
        self, waiting: SequenceQueue, rate: float, paced: Seq[EngineView]
    ) -> list[Choices]:
        """Some of those let in unjudged that can be judged now. Those that have begun stay."""
        judged = list[Choices]()
        if not rate and not paced:
            return judged
        while self._unjudged and len(judged) < _AT_ONCE:
            if not _is_known(self._unjudged[0], rate, paced):
                break
            choices = self._unjudged.popleft()
            if _all_wait(choices, waiting):
                judged.append(choices)
        return judged

    def _ask_again(self, rate: float, paced: Seq[EngineView], now: float) -> list[AskAgain]:
        while self._deadlines and _is_safe(self._deadlines[0][-1]):
            heappop(self._deadlines)
        at = self._deadlines[0][0] if self._deadlines else inf
        if self._unjudged and _is_known(self._unjudged[0], rate, paced):
            at = min(at, now + _SOON_S)
        return [AskAgain(at)] if at < inf else []


def _requests(arrived: Iterable[Sequence]) -> list[Choices]:
    """The requests that have come, by their choices; without those that lack one, since it has
    failed, or whose first choice has come before."""
    together: dict[int, list[Sequence]] = {}
    for sequence in arrived:
        together.setdefault(id(sequence.request), []).append(sequence)
    every = map(tuple, together.values())
    return [
        choices
        for choices in every
        if not choices[0].choice and len(choices) in (1, choices[0].request.params.n)
    ]


def _all_wait(choices: Choices, waiting: SequenceQueue) -> bool:
    """Whether nothing has begun of a request: it can be refused now."""
    return all(each in waiting and not each.output for each in choices)


def _is_safe(choices: Choices) -> bool:
    """Whether a request will never be refused, since a choice has a token or has ended."""
    return any(each.done or each.output for each in choices)


def _is_known(choices: Choices, rate: float, paced: Seq[EngineView]) -> bool:
    """Whether enough has been measured to judge all that a request wants."""
    request, slo = choices[0].request, choices[0].request.slo
    soon = request.deadline is not None or (slo is not None and slo.ttft is not None)
    steady = slo is not None and slo.tpot is not None and choices[0].max_new_tokens > 1
    return bool((rate or not soon) and (paced or not steady))


def _by_place(
    requests: dict[int, Choices], waiting: SequenceQueue
) -> list[tuple[int, int, int, Sequence]]:
    """The choices of requests in the order of the queue: the tokens before each, its order, its
    request's key, and itself."""
    return sorted(
        (waiting.tokens_before(each), each.order, key, each)
        for key, choices in requests.items()
        for each in choices
    )


def _too_late(sequence: Sequence) -> Shed:
    """Refuse a request whose deadline has passed."""
    reason = f"its deadline of {sequence.request.deadline:g} s has passed before a first token"
    return Shed(sequence, "deadline", reason)


def _tokens_a_second(engines: Seq[EngineView]) -> float:
    """Prompt tokens that all of them together compute, each in steps of its whole budget; 0 where
    none has been measured. One that has not is taken to be like the others."""
    rates = []
    for view in engines:
        step = view.prefill_times.seconds(view.token_budget)
        if step:
            rates.append(view.token_budget / step)
    return sum(rates) / len(rates) * len(engines) if rates else 0.0


def _too_slow(
    sequence: Sequence, engines: Seq[EngineView], queue: float | None, now: float
) -> Shed | None:
    """Refuse a request whose first token is predicted to come too late.

    Args:
      queue: seconds that what comes before it takes; None where nothing has been measured.
    """
    request = sequence.request
    ttft = None if request.slo is None else request.slo.ttft
    bounds = {"deadline": request.deadline, "slo.ttft": ttft}
    wanted = {name: most for name, most in bounds.items() if most is not None}
    if not wanted or queue is None:
        return None
    own, surely = inf, False
    for view in engines:
        tokens = sequence.length - view.cached(sequence)
        seconds = prefill_seconds(view.prefill_times, view.token_budget, tokens)
        if seconds is not None and seconds < own:
            size = min(tokens, view.buckets.token_budget)
            own, surely = seconds, view.prefill_times.knows(size)
    name, most = min(wanted.items(), key=lambda pair: pair[1])
    if own > most and surely:
        reason = f"{name}={most:g} s, but its prompt alone takes {own:.3g} s"
        return Shed(sequence, "impossible", reason)
    predicted = now - request.arrival + queue + own
    if predicted <= most:
        return None
    reason = f"{name}={most:g} s, but its first token is predicted after {predicted:.3g} s"
    return Shed(sequence, "overload", reason)


def _too_far_apart(sequence: Sequence, engines: Seq[EngineView]) -> Shed | None:
    """Refuse a request whose tokens are predicted to come too far apart on every engine, as full as
    each is now.

    Args:
      engines: that have been measured.
    """
    slo = sequence.request.slo
    if slo is None or slo.tpot is None or not engines or sequence.max_new_tokens < 2:
        return None
    alone = [(view.token_times.seconds(1) or 0.0, view.token_times.knows(1)) for view in engines]
    least, surely = min(alone)
    if least > slo.tpot and surely:
        reason = f"slo.tpot={slo.tpot:g} s, but alone its tokens are {least:.3g} s apart"
        return Shed(sequence, "impossible", reason)
    predicted = min(
        view.token_times.seconds(min(view.rows, view.rows - view.free_rows + 1)) or 0.0
        for view in engines
    )
    if predicted <= slo.tpot:
        return None
    reason = f"slo.tpot={slo.tpot:g} s, but its tokens are predicted {predicted:.3g} s apart"
    return Shed(sequence, "overload", reason)
