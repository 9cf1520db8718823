"""Which requests are refused early: none, or those that would be late anyway."""

from collections.abc import Sequence as Seq
from math import inf

from pdjax.host.policies.api import AskAgain, EngineView, PolicySetup, Shed
from pdjax.host.sequences.sequence import Sequence
from pdjax.host.step_times import prefill_seconds


class AdmitAll:
    """No request is shed: each waits for as long as it takes."""

    sheds = False

    def __init__(self, setup: PolicySetup | None = None) -> None:
        del setup

    def shed(
        self,
        arrived: Seq[Sequence],
        waiting: Seq[Sequence],
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
    without what is cached. While no engine has finished a step, all are let in. A request
    without a deadline or SLO is never refused.
    """

    sheds = True

    def __init__(self, setup: PolicySetup | None = None) -> None:
        del setup

    def shed(
        self,
        arrived: Seq[Sequence],
        waiting: Seq[Sequence],
        prefill: Seq[EngineView],
        decode: Seq[EngineView],
        now: float,
    ) -> list[Shed | AskAgain]:
        """See `AdmissionPolicy`. It looks at the whole queue."""
        plan: list[Shed | AskAgain] = []
        new, soonest = {id(sequence) for sequence in arrived}, inf
        rate = _tokens_a_second(prefill)
        ahead = sum(view.backlog for view in prefill)
        for sequence in waiting:
            request = sequence.request
            due = inf if request.deadline is None else request.arrival + request.deadline
            refused = None
            if not sequence.output:
                if now >= due:
                    late = f"its deadline of {request.deadline:g} s has passed before a first token"
                    refused = Shed(sequence, "deadline", late)
                elif id(sequence) in new:
                    refused = _too_slow(sequence, prefill, ahead / rate if rate else None, now)
                    refused = refused or _too_far_apart(sequence, decode)
                if refused is None:
                    soonest = min(soonest, due)
            if refused is None:
                ahead += sequence.length
            else:
                plan.append(refused)
        if soonest < inf:
            plan.append(AskAgain(soonest))
        return plan


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
    each is now."""
    slo = sequence.request.slo
    measured = [view for view in engines if view.token_times.measured]
    if slo is None or slo.tpot is None or not measured or sequence.max_new_tokens < 2:
        return None
    alone = [(view.token_times.seconds(1) or 0.0, view.token_times.knows(1)) for view in measured]
    least, surely = min(alone)
    if least > slo.tpot and surely:
        reason = f"slo.tpot={slo.tpot:g} s, but alone its tokens are {least:.3g} s apart"
        return Shed(sequence, "impossible", reason)
    predicted = min(
        view.token_times.seconds(min(view.rows, view.rows - view.free_rows + 1)) or 0.0
        for view in measured
    )
    if predicted <= slo.tpot:
        return None
    reason = f"slo.tpot={slo.tpot:g} s, but its tokens are predicted {predicted:.3g} s apart"
    return Shed(sequence, "overload", reason)
