"""Plans that cannot be carried out: each is refused with the policy, the plan and what is wrong,
nothing of it happens, and the coordinator goes on."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import HandoffConfig
from pdjax.core.ids import EngineId, PoolId
from pdjax.host.batching.chunks import Chunk
from pdjax.host.policies.api import (
    Admission,
    GrowthPlan,
    Migration,
    PolicySetup,
    Reservation,
    StepPlan,
)
from pdjax.host.policies.check import (
    BadPlan,
    check_admissions,
    check_growth,
    check_steps,
    check_withdrawals,
)
from pdjax.host.policies.decode import FcfsDecode
from pdjax.host.policies.handoff import HandoffRules
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.policies.registry import make_policies
from pdjax.host.policies.router import LeastLoaded
from pdjax.host.sequences.sequence import Sequence, State
from tests.helpers.deployment import CONFIG, Deployment, deploy, expected
from tests.helpers.views import decode_view, prefill_view, sequence

NOW = 10.0
PREFILL, DECODE = EngineId("prefill/0"), EngineId("decode/0")


class Mine:
    """Makes the plans of these tests."""


def refused(message: str, check: Callable[..., None], *args: Any) -> None:
    with pytest.raises(BadPlan, match=message) as refusal:
        check(Mine(), *args)
    text = str(refusal.value)
    assert text.startswith("policy Mine: ") and "\n" not in text and len(text) < 300


def step(*chunks: tuple[Sequence, int, int], engine: EngineId = PREFILL) -> StepPlan:
    return StepPlan(engine, tuple(Chunk(*chunk) for chunk in chunks))


def running(order: int, tokens: int, prefilled: int, **state: Any) -> Sequence:
    values = {"state": State.PREFILLING, "engine": PREFILL, **state}
    return sequence(order, tokens, prefilled=prefilled, **values)


WAITING, BEGUN = sequence(0, 8), running(1, 8, 4)
ELSEWHERE = running(2, 8, 4, engine=EngineId("prefill/1"))
CACHED: dict[str, Any] = {"cached": lambda sequence: 4}


@pytest.mark.parametrize(
    ("plans", "view", "message"),
    [
        (
            [step((WAITING, 0, 8), engine=EngineId("prefill/9"))],
            {},
            r"step of prefill/9 with \['r0#0\[0:8\]'\]: engine prefill/9 does not take a prefill",
        ),
        ([step((WAITING, 0, 8))], {"open": False}, "engine prefill/0 does not take a prefill step"),
        ([step((WAITING, 0, 4)), step((BEGUN, 4, 8))], {}, "prefill/0 does not take a prefill st"),
        ([step((sequence(0, 11), 0, 11))], {}, "11 tokens; a step has at most 10"),
        ([step(*((sequence(i, 1), 0, 1) for i in range(5)))], {}, "5 sequences; a step has at mo"),
        (
            [step((running(0, 60, 58), 58, 60), (sequence(1, 8), 0, 8))],
            {},
            "17 pages to read; a step has at most 16",
        ),
        ([step((BEGUN, 4, 6), (BEGUN, 6, 8))], {}, r"sequence r1#0 is in two chunks"),
        (
            [step((WAITING, 4, 8))],
            {},
            r"tokens 4 to 8 of .*: must begin at a page boundary up to",
        ),
        ([step((WAITING, -4, 4))], {}, "tokens -4 to 4 of sequence r0#0: must begin at a page bo"),
        ([step((WAITING, 2, 8))], CACHED, "tokens 2 to 8 .*must begin at a page boundary up to 4"),
        ([step((WAITING, 0, 9))], {}, "tokens 0 to 9 .* end by 8"),
        ([step((WAITING, 0, 0))], {}, "tokens 0 to 0 of sequence r0#0"),
        ([step((BEGUN, 0, 8))], {}, "tokens 0 to 8 of sequence r1#0: must begin at 4 and end by 8"),
        ([step((BEGUN, 5, 8))], {}, "tokens 5 to 8 of sequence r1#0: must begin at 4 and end by 8"),
        (
            [step((ELSEWHERE, 4, 8))],
            {},
            "sequence r2#0 is prefilling and neither waits nor is prefilled by prefill/0",
        ),
        (
            [step((sequence(0, 8, state=State.FINISHED), 0, 8))],
            {},
            "sequence r0#0 is finished and neither waits",
        ),
        (
            [step((WAITING, 0, 5), (sequence(3, 5), 0, 5))],
            {"free_pages": 3},
            "the sequences that it admits need 4 pages of pool hbm/prefill-0, of which 3 are free",
        ),
    ],
)
def test_bad_steps(plans, view, message):
    refused(message, check_steps, plans, [prefill_view(**view)], NOW)


def test_engines_that_share_a_pool_cannot_promise_its_pages_twice():
    pool = PoolId("hbm/0")
    views = [replace(prefill_view(i, free_pages=3), pool=pool) for i in range(2)]
    plans = [step((sequence(i, 8), 0, 8), engine=views[i].engine) for i in range(2)]
    refused("need 4 pages of pool hbm/0, of which 3 are free", check_steps, plans, views, NOW)
    check_steps(Mine(), plans[:1], views, NOW)


def test_good_steps_pass():
    view = prefill_view(**CACHED)
    check_steps(Mine(), [step((WAITING, 0, 4), (BEGUN, 4, 5))], [view], NOW)
    check_steps(Mine(), [step((WAITING, 4, 8))], [view], NOW)
    check_steps(Mine(), [step((WAITING, 0, 8))], [view], NOW)  # though some of it is cached


ROOM = decode_view(0, free_rows=1)


@pytest.mark.parametrize(
    ("plan", "view", "message"),
    [
        ([Admission(BEGUN, DECODE)], {}, "admission of r1#0 to decode/0: sequence r1#0 is not one"),
        ([Admission(WAITING, DECODE)] * 2, {"free_rows": 4}, "r0#0 is not one .* or comes twice"),
        ([Admission(WAITING, PREFILL)], {}, "engine prefill/0: allowed are decode/0$"),
        ([Migration(WAITING, PREFILL)], {}, "migration of r0#0 to prefill/0: engine prefill/0: al"),
        ([Admission(WAITING, DECODE)], {"free_rows": 0}, "engine decode/0 has 0 free rows"),
        (
            [Admission(WAITING, DECODE)],
            {"sources": frozenset({PoolId("hbm/decode-0")})},
            "no KV comes from pool hbm/prefill-0 to hbm/decode-0",
        ),
        (
            [Migration(WAITING, DECODE)],
            {"pool": PoolId("hbm/prefill-0")},
            "its KV is in pool hbm/prefill-0 already",
        ),
    ],
)
def test_bad_admissions_and_migrations(plan, view, message):
    views = [decode_view(**{"free_rows": 1, **view})]
    refused(message, check_admissions, plan, [WAITING], views, type(plan[0]))


A, B, C = (sequence(order, 4, pages=1, state=State.DECODING) for order in range(3))


@pytest.mark.parametrize(
    ("plan", "free", "message"),
    [
        (
            GrowthPlan((), ()),
            2,
            r"growth of \[\] with victims \[\]: sequences \['r0#0', 'r1#0'\] g",
        ),
        (GrowthPlan((), (A,)), 2, r"sequences \['r1#0'\] get no page and do not give way"),
        (GrowthPlan((), (A, B)), 1, "2 sequences grow, but 1 pages are there"),
        (GrowthPlan((C,), (A, B)), 0, "2 sequences grow, but 1 pages are there"),
        (GrowthPlan((), (A, A)), 2, "a sequence is in it twice"),
        (GrowthPlan((C, C), (A, B)), 0, "a sequence is in it twice"),
        (GrowthPlan((), (A, C)), 2, r"sequences \['r2#0'\] need no page now"),
        (GrowthPlan((), (A, B, C)), 3, r"sequences \['r2#0'\] need no page now"),
        (GrowthPlan((WAITING,), (A, B)), 2, r"victims \['r0#0'\] hold no pages of the pool"),
    ],
)
def test_bad_growth(plan, free, message):
    refused(message, check_growth, plan, [A, B], [A, B, C], free)


def test_good_growth_passes():
    for plan, free in ((GrowthPlan((), (B, A)), 2), (GrowthPlan((C, B), (A,)), 0)):
        check_growth(Mine(), plan, [A, B], [A, B, C], free)


def test_bad_withdrawals():
    known = Reservation(3, A, 1, cache=False, opened=0.0)
    stranger = replace(known, handoff=4)
    asked = {known: object()}
    what = "is not one of the reservations asked about"
    refused(f"withdrawal of hand-off 4: {what}", check_withdrawals, [known, stranger], asked)
    refused(f"withdrawal of hand-off 3: {what}", check_withdrawals, [known, known], asked)
    check_withdrawals(Mine(), [known], asked)


# In a coordinator: a policy that makes a bad plan once.


class BadSteps(FcfsPrefill):
    bad = True

    def plan(self, waiting, engines, now):
        plans = super().plan(waiting, engines, now)
        if plans and self.bad:
            self.bad = False
            [chunk, *_] = plans[0].chunks
            return [StepPlan(plans[0].engine, (replace(chunk, stop=chunk.sequence.length + 1),))]
        return plans


class BadAdmissions(FcfsDecode):
    bad = True

    def admit(self, prefilled, engines, now):
        if prefilled and self.bad:
            self.bad = False
            return [Admission(prefilled[0], EngineId("prefill/0"))]
        return super().admit(prefilled, engines, now)


class BadRoomAhead(FcfsDecode):
    bad = True

    def admit_ahead(self, streaming, prefilled, engines, now):
        if self.bad:
            self.bad = False
            return [Admission(streaming[0], EngineId("decode/7"))]
        return super().admit_ahead(streaming, prefilled, engines, now)


class BadGrowth(FcfsDecode):
    bad = True

    def grow(self, needing, holders, free_pages, now):
        if self.bad:
            self.bad = False
            return GrowthPlan((), ())
        return super().grow(needing, holders, free_pages, now)


class BadMigrations(HandoffRules):
    bad = True

    def migrations(self, engines, decoding, prefilled, migrating, now):
        for engine, sequences in decoding.items():
            if sequences and self.bad:
                self.bad = False
                return [Migration(sequences[0], engine)]
        return super().migrations(engines, decoding, prefilled, migrating, now)


class BadWithdrawals(HandoffRules):
    bad = True

    def withdraw(self, reservations, pages, now):
        if reservations and self.bad:
            self.bad = False
            return [*reservations, *reservations]
        return super().withdraw(reservations, pages, now)


def with_policy(role: str, policy: Any, budget: int = 8, **how: Any) -> Deployment:
    config = replace(
        CONFIG,
        prefill=replace(CONFIG.prefill, token_budget=budget),
        handoff=HandoffConfig(rebalance=policy is BadMigrations),
    )
    made = policy(PolicySetup(config, LeastLoaded()))
    policies = make_policies(config, {role: made})
    return deploy(config, policies=policies, **how)


@pytest.mark.parametrize(
    ("role", "policy", "message"),
    [
        ("prefill", BadSteps, r"policy BadSteps: step of prefill/0 with \['a#0\[0:6\]'\]: tokens"),
        ("decode", BadAdmissions, "policy BadAdmissions: admission of a#0 to prefill/0: engine"),
        ("decode", BadRoomAhead, "policy BadRoomAhead: admission of a#0 to decode/7: engine dec"),
        ("decode", BadGrowth, r"policy BadGrowth: growth of \[\] with victims \[\]: sequences"),
        ("handoff", BadMigrations, "policy BadMigrations: migration of a#0 to decode/0: its KV"),
    ],
)
def test_the_coordinator_goes_on_after_a_bad_plan(role, policy, message):
    # The second decode engine takes part in nothing but a migration.
    deployment = with_policy(role, policy, stages=(1, 2))
    asked = [deployment.submit(name, prompt_len=5, max_tokens=9) for name in "abc"]
    errors: list[BadPlan] = []
    for _ in range(1000):
        if not deployment.coordinator.has_work:
            break
        try:
            deployment.coordinator.step()
        except BadPlan as bad:
            errors.append(bad)
        deployment.coordinator.check()
    [error] = errors
    assert str(error).startswith(message.replace("\\", "")) and "\n" not in str(error)
    assert [each.state for each in asked] == [State.FINISHED] * 3
    assert [each.output for each in asked] == [expected(each) for each in asked]
    assert not deployment.transport.under_way


def test_the_coordinator_goes_on_after_bad_withdrawals():
    """Room is held ahead for a prompt that takes long, and a sequence that decodes needs it."""
    deployment = with_policy("handoff", BadWithdrawals, budget=2, pages=(40, 17))
    old = deployment.submit("old", prompt_len=15, max_tokens=20)
    deployment.run_until(lambda: old.state is State.DECODING)
    young = deployment.submit("young", prompt_len=33, max_tokens=3)
    with pytest.raises(BadPlan, match="policy BadWithdrawals: withdrawal of hand-off"):
        deployment.run()
    deployment.run()
    assert [old.output, young.output] == [expected(old), expected(young)]
