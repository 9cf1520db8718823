"""Where sequences are prefilled, and how many of their tokens join rows."""

from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import Config, PoliciesConfig
from pdjax.host.policies.api import EngineView, PolicySetup
from pdjax.host.policies.check import BadPlan, mixed_tokens_of, placed
from pdjax.host.policies.placement import ConditionalPlacement, RemotePlacement
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.policies.router import LeastLoaded
from pdjax.host.sequences.sequence import Sequence
from pdjax.host.step_times import StepTimes
from tests.helpers.views import chunks, flexible_view, prefill_view, sequence, times

SLOW, FAST = times(1.0, 0.0), times(0.01, 0.0)


def setup(**policies: Any) -> PolicySetup:
    return PolicySetup(Config(policies=PoliciesConfig(**policies)), LeastLoaded())


def conditional(local_tokens: int = 0, **policies: Any) -> ConditionalPlacement:
    return ConditionalPlacement(setup(local_tokens=local_tokens, **policies))


def chosen(policy: ConditionalPlacement, seq: Sequence, *views: EngineView) -> list[str]:
    return sorted(view.engine for view in policy.engines_for(seq, views, 0.0))


def test_remote_is_for_the_engines_that_are_for_prefill():
    views = [prefill_view(0), prefill_view(1), flexible_view(0)]
    assert RemotePlacement().engines_for(sequence(0, 5), views, 0.0) == views[:2]
    assert RemotePlacement().mixed_tokens(views[2]) == 8


def test_a_short_part_stays_with_decode():
    remote, local, cached = prefill_view(0), flexible_view(0), flexible_view(1)
    cached = replace(cached, cached=lambda seq: 16)
    policy = conditional(8)
    assert chosen(policy, sequence(0, 8), remote, local) == ["decode/0"]
    assert chosen(policy, sequence(0, 9), remote, local) == ["prefill/0"]
    assert chosen(policy, sequence(0, 20), remote, local, cached) == ["decode/1"]


@pytest.mark.parametrize(
    "lacking",
    [
        {"free_rows": 0},
        {"free_rows": 1, "running": (sequence(7, 20, prefilled=8),)},
        {"free_pages": 1},
        {"free_pages": 5, "rows_of_pool": 4},
        {"total_pages": 2},
    ],
)
def test_decode_must_have_a_row_and_pages(lacking):
    short, policy = sequence(0, 6, 10), conditional(8)
    views = prefill_view(0), flexible_view(0, **lacking)
    assert chosen(policy, short, *views) == ["prefill/0"]


def test_what_no_prefill_engine_can_ever_hold_is_for_decode():
    views = prefill_view(0, total_pages=2), flexible_view(0, free_rows=0)
    assert chosen(conditional(), sequence(0, 12), *views) == ["decode/0"]


def test_an_engine_that_takes_no_prompts_is_not_waited_for():
    ending = prefill_view(0, takes_prompts=False)
    assert chosen(conditional(), sequence(0, 12), ending, flexible_view(0)) == ["decode/0"]
    ending = flexible_view(0, takes_prompts=False)
    assert chosen(conditional(20), sequence(0, 12), prefill_view(0), ending) == ["prefill/0"]


def test_a_late_prefill_side_is_passed_by():
    late = prefill_view(0, backlog=100, prefill_times=SLOW)  # 11 steps of 10 tokens
    beside = flexible_view(0, free_rows=2, tick_times=FAST, chunk_times=FAST)
    prompt = sequence(0, 16)
    assert chosen(conditional(), prompt, late, beside) == ["decode/0"]
    soon = replace(late, backlog=0, prefill_times=FAST)
    assert chosen(conditional(), prompt, soon, beside) == ["prefill/0"]


def test_predictions_need_measurements():
    prompt, unknown = sequence(0, 16), prefill_view(0, backlog=100)
    beside = flexible_view(0, free_rows=2, tick_times=FAST, chunk_times=FAST)
    assert chosen(conditional(), prompt, unknown, beside) == ["prefill/0"]
    late = prefill_view(0, backlog=100, prefill_times=FAST)
    assert chosen(conditional(), prompt, late, flexible_view(0, free_rows=2)) == ["prefill/0"]
    # An engine without rows, and chunks that have never joined rows, take what steps alone do.
    assert chosen(conditional(), prompt, late, flexible_view(0)) == ["decode/0"]
    fresh = flexible_view(0, free_rows=2, tick_times=FAST)
    assert chosen(conditional(), prompt, late, fresh) == ["decode/0"]


def test_steps_of_one_size_do_not_say_that_chunks_cost_as_much():
    """Prompts of one length: all prefill steps are alike, and no chunk has been tried."""
    whole = StepTimes()
    whole.add(10, 0.1)
    late = prefill_view(0, backlog=30, prefill_times=whole)  # 400 ms
    fresh = flexible_view(0, free_rows=2, tick_times=FAST)  # 100 ms in ticks, 20 of their own
    assert chosen(conditional(), sequence(0, 10), late, fresh) == ["decode/0"]
    assert chosen(conditional(), sequence(0, 10), replace(late, backlog=0), fresh) == ["prefill/0"]


def test_a_little_sooner_is_not_worth_it():
    prompt = sequence(0, 8)
    beside = flexible_view(0, prefill_times=times(0.1, 0.0))
    for seconds, engine in ((0.12, "prefill/0"), (0.13, "decode/0")):
        remote = prefill_view(0, prefill_times=times(seconds, 0.0))
        assert chosen(conditional(), prompt, remote, beside) == [engine]


def paced(tpot_target: float | None = None, **view: Any) -> int:
    defaults = {"free_rows": 2, "tick_times": FAST, "chunk_times": times(0.002, 0.001)}
    return conditional(tpot_target=tpot_target).mixed_tokens(
        flexible_view(0, **{**defaults, **view})
    )


def test_chunks_leave_rows_the_time_that_they_want():
    assert paced() == 8
    assert paced(0.1) == 8
    assert paced(0.0155) == 3  # 10 ms of the tick, 2 of any chunk, 1 of each token
    assert paced(0.1, tpot=0.0155) == 3
    assert paced(0.0155, tpot=0.1) == 3
    assert paced(0.011) == 0
    assert paced(0.009) == 0
    assert paced(0.009, free_rows=4) == 8  # no row waits


def test_unknown_chunks_are_tried_by_the_smallest_step():
    buckets = replace(flexible_view().buckets, mixed_tokens=(4, 8))
    assert paced(0.0155, chunk_times=StepTimes(), buckets=buckets) == 4
    assert paced(0.0155, chunk_times=StepTimes(), tick_times=StepTimes(), buckets=buckets) == 8


def test_a_prompt_that_has_begun_goes_on():
    buckets = replace(flexible_view().buckets, mixed_tokens=(4, 8))
    begun = (sequence(0, 20, prefilled=8),)
    assert paced(0.009, buckets=buckets, running=begun) == 4
    assert paced(0.009, buckets=buckets) == 0


def test_no_new_prompt_where_rows_leave_no_time():
    short, remote = sequence(0, 6), prefill_view(0)
    views = [flexible_view(0, free_rows=2, tick_times=times(n, 0.0)) for n in (0.01, 0.02)]
    policy = conditional(8, tpot_target=0.015)
    assert chosen(policy, short, remote, views[0]) == ["decode/0"]
    assert chosen(policy, short, remote, views[1]) == ["prefill/0"]


def test_who_waits_for_prefill_lets_others_pass_to_decode():
    policy = FcfsPrefill(replace(setup(), placement=conditional(8)))
    busy, local = prefill_view(0, open=False), flexible_view(0)
    long, short, other = sequence(0, 20), sequence(1, 5), sequence(2, 20)
    plans = policy.plan([long, short, other], [busy, local], 0.0)
    assert {plan.engine: chunks(plan) for plan in plans} == {"decode/0": [(1, 0, 5)]}
    plans = policy.plan([long, short, other], [prefill_view(0), local], 0.0)
    assert {plan.engine: chunks(plan) for plan in plans} == {
        "prefill/0": [(0, 0, 10)],
        "decode/0": [(1, 0, 5)],
    }


def test_who_is_passed_counts_in_the_backlog():
    late, policy = prefill_view(0, open=False, prefill_times=times(0.0, 0.01)), conditional()
    fcfs = FcfsPrefill(replace(setup(), placement=policy))
    beside = flexible_view(0, prefill_times=times(0.0, 0.02))
    first, second = sequence(0, 10), sequence(1, 5)  # 100 ms there, then 150 against 100
    assert [chunks(p) for p in fcfs.plan([first, second], [late, beside], 0.0)] == [[(1, 0, 5)]]
    assert not fcfs.plan([second], [late, beside], 0.0)


def test_one_row_is_for_one_prompt():
    fcfs = FcfsPrefill(replace(setup(), placement=conditional(8)))
    views = [prefill_view(0, open=False), flexible_view(0, free_rows=1)]
    [plan] = fcfs.plan([sequence(0, 3), sequence(1, 3)], views, 0.0)
    assert chunks(plan) == [(0, 0, 3)]


def test_the_queue_is_not_searched_for_ever():
    class Counts(ConditionalPlacement):
        asked = 0

        def engines_for(self, *given: Any) -> Any:
            Counts.asked += 1
            return super().engines_for(*given)

    fcfs = FcfsPrefill(replace(setup(), placement=Counts(setup(local_tokens=2))))
    views = [prefill_view(0, open=False), flexible_view(0)]
    assert not fcfs.plan([sequence(i, 20) for i in range(1000)], views, 0.0)
    assert Counts.asked < 50


class Wrong:
    local = True

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def engines_for(self, *given: Any) -> Any:
        return self._answer

    def mixed_tokens(self, view: EngineView) -> Any:
        return self._answer


@pytest.mark.parametrize("answer", [None, ["decode/0"], [flexible_view(9)]])
def test_wrong_engines_are_refused(answer):
    with pytest.raises(BadPlan, match=r"Wrong: engines_for of r0#0=.*: must be a list or tuple of"):
        placed(Wrong(answer), sequence(0, 3), [flexible_view(0)], 0.0)


@pytest.mark.parametrize("answer", [None, -1, 9, 2.0, True])
def test_wrong_tokens_are_refused(answer):
    with pytest.raises(BadPlan, match=r"mixed_tokens of decode/0=.*: must be a whole number"):
        mixed_tokens_of(Wrong(answer), flexible_view(0))
