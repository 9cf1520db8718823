"""Policies whose answers are of a wrong type, or consist of such: each is refused with the policy,
the place in its answer, the value and what is allowed, and the coordinator goes on."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pdjax.host.batching.chunks import Chunk
from pdjax.host.policies.api import (
    Admission,
    AskAgain,
    GiveBack,
    GrowthPlan,
    Migration,
    PolicySetup,
    Reservation,
    StepPlan,
)
from pdjax.host.policies.check import (
    BadPlan,
    agrees,
    check_admissions,
    check_growth,
    check_steps,
    check_withdrawals,
    choose,
)
from pdjax.host.policies.decode import FcfsDecode
from pdjax.host.policies.handoff import HandoffRules
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.policies.registry import make_policies
from pdjax.host.policies.router import LeastLoaded
from pdjax.host.sequences.sequence import State
from tests.helpers.deployment import CONFIG, deploy, expected
from tests.helpers.views import decode_view, prefill_view, sequence
from tests.host.test_bad_plans import DECODE, PREFILL, A, B, C, refused

WAITING = sequence(0, 8)
CHUNK = Chunk(WAITING, 0, 8)
STEP = StepPlan(PREFILL, (CHUNK,))
FOREIGN: Any = object()


def changed(step: StepPlan, **fields: Any) -> list[StepPlan]:
    return [replace(step, **fields)]


def with_chunk(**fields: Any) -> list[StepPlan]:
    return changed(STEP, chunks=(CHUNK, replace(CHUNK, **fields)))


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        (None, "plan=None: must be a list or tuple of StepPlan or AskAgain$"),
        (STEP, "plan=StepPlan: must be a list or tuple of StepPlan or AskAgain$"),
        ("prefill/0", "plan='prefill/0': must be a list or tuple of StepPlan or AskAgain$"),
        ([STEP, None], r"plan\[1\]=None: must be of type StepPlan or AskAgain$"),
        (
            [Admission(WAITING, PREFILL)],
            r"plan\[0\]=Admission: must be of type StepPlan or AskAgain$",
        ),
        (changed(STEP, engine=["x"]), r"plan\[0\].engine=\['x'\]: must be of type str$"),
        (changed(STEP, engine=prefill_view()), r"engine=view of 'prefill/0': must be of type str$"),
        (changed(STEP, chunks=[CHUNK]), r"plan\[0\].chunks=\[Chunk.*: must be of type tuple$"),
        (changed(STEP, chunks=(WAITING,)), r"chunks\[0\]=Sequence: must be of type Chunk$"),
        (with_chunk(sequence="r0"), r"plan\[0\].chunks\[1\].sequence='r0': must be of type Seq"),
        (with_chunk(start=4.0), r"plan\[0\].chunks\[1\].start=4.0: must be of type int$"),
        ([AskAgain("soon")], r"plan\[0\].at='soon': must be of type int or float$"),  # type: ignore
        ([STEP, AskAgain(10.0)], r"plan\[1\].at=10.0: must be a moment after now, which is 10.0$"),
        ([AskAgain(float("inf"))], r"plan\[0\].at=inf: must be a moment after now"),
        ([AskAgain(float("nan"))], r"plan\[0\].at=nan: must be a moment after now"),
        (with_chunk(stop=None), r"plan\[0\].chunks\[1\].stop=None: must be of type int$"),
    ],
)
def test_steps(plans, message):
    refused(f"policy Mine: .*{message}", check_steps, plans, [prefill_view()], 10.0)


@pytest.mark.parametrize(
    ("plan", "kind", "message"),
    [
        (None, Admission, "plan=None: must be a list or tuple of Admission$"),
        ({}, Admission, "plan={}: must be a list or tuple of Admission$"),
        ((), Admission, None),
        ([(WAITING, DECODE)], Admission, r"plan\[0\]=\(.*\): must be of type Admission$"),
        ([Migration(WAITING, DECODE)], Admission, r"plan\[0\]=Migration: must be of type Adm"),
        ([Admission(WAITING, DECODE)], Migration, r"plan\[0\]=Admission: must be of type Mig"),
        ([Admission(FOREIGN, DECODE)], Admission, r"plan\[0\].sequence=<object .*: must be of"),
        ([Admission(WAITING, FOREIGN)], Admission, r"plan\[0\].engine=<object .* type str$"),
    ],
)
def test_admissions_and_migrations(plan, kind, message):
    check = [plan, [WAITING], [decode_view(free_rows=1)], kind]
    if message is None:
        check_admissions(FOREIGN, *check)
    else:
        refused(message, check_admissions, *check)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (None, "plan=None: must be of type GrowthPlan$"),
        ([], r"plan=\[\]: must be of type GrowthPlan$"),
        (GrowthPlan((), FOREIGN), "plan.grown=<object .*: must be of type tuple$"),
        (GrowthPlan(FOREIGN, (A, B)), "plan.victims=<object .*: must be of type tuple$"),
        (GrowthPlan((), (A, "r1#0")), r"plan.grown\[1\]='r1#0': must be of type Sequence$"),  # type: ignore[arg-type]
        (GrowthPlan((0,), (A, B)), r"plan.victims\[0\]=0: must be of type Sequence$"),  # type: ignore[arg-type]
    ],
)
def test_growth(plan, message):
    refused(message, check_growth, plan, [A, B], [A, B, C], 2)


def test_withdrawals():
    known = Reservation(3, A, 1, cache=False, opened=0.0)
    asked = {known: FOREIGN}
    refused("plan=None: must be a list or tuple of Reser", check_withdrawals, None, asked)
    refused(r"plan\[1\]=3: must be of type Reservation$", check_withdrawals, [known, 3], asked)
    unhashable: Any = []
    wrong = replace(known, opened=unhashable)
    message = r"plan\[0\].opened=\[\]: must be of type int or float$"
    refused(message, check_withdrawals, [wrong], asked)


@pytest.mark.parametrize("answer", [None, 1, np.array([True, False]), FOREIGN])
def test_neither_yes_nor_no(answer):
    class Rules(HandoffRules):
        def stays(self, sequence):
            return answer

        def gives_back(self, move):
            return answer

    rules = Rules(PolicySetup(CONFIG))
    with pytest.raises(BadPlan, match=r"^policy Rules: stays of r0#0=.*: must be True or False$"):
        agrees(rules, "stays", WAITING)
    with pytest.raises(BadPlan, match=r"^policy Rules: gives_back of r0#0=.*: must be True or"):
        agrees(rules, "gives_back", GiveBack(WAITING, 8, 2, 9))
    assert agrees(rules, "streams", WAITING) is False


@pytest.mark.parametrize(
    ("answer", "shown"),
    [(None, "None"), ("prefill/0", "'prefill/0'"), (prefill_view(7), "view of 'prefill/7'")],
)
def test_engines_that_a_router_was_not_asked_about(answer, shown):
    class Router(LeastLoaded):
        def prefill_engine(self, sequence, engines):
            return answer

        decode_engine = prefill_engine

    wanted = f"{shown}: must be the view of one of prefill/0, prefill/1$"
    views = [prefill_view(0), prefill_view(1)]
    with pytest.raises(BadPlan, match=f"^policy Router: prefill_engine of r0#0={wanted}"):
        choose(Router(), "prefill_engine", WAITING, views)
    setup = PolicySetup(CONFIG, Router())
    with pytest.raises(BadPlan, match=r"^policy Router: prefill_engine of r0#0=.*must be the view"):
        FcfsPrefill(setup).plan([WAITING], views, 0.0)
    with pytest.raises(BadPlan, match=r"^policy Router: decode_engine of r0#0=.*must be the view"):
        FcfsDecode(setup).admit([WAITING], [decode_view(0, free_rows=1)], 0.0)


# In a coordinator: each question is answered with nonsense once.


def nonsense_once(kind: type, method: str) -> Any:
    """A policy of one's own that forgets to return something, once."""

    class Forgetful(kind):
        asked = False

        def __getattribute__(self, name):
            if name == method and not self.asked:

                def forget(*args):
                    self.asked = True

                return forget
            return super().__getattribute__(name)

    return Forgetful


@pytest.mark.parametrize(
    ("role", "kind", "method"),
    [
        ("prefill", FcfsPrefill, "plan"),
        ("decode", FcfsDecode, "grow"),
        ("decode", FcfsDecode, "admit"),
        ("decode", FcfsDecode, "admit_ahead"),
        ("handoff", HandoffRules, "stays"),
        ("handoff", HandoffRules, "streams"),
        ("handoff", HandoffRules, "gives_back"),
        ("handoff", HandoffRules, "migrations"),
        ("router", LeastLoaded, "prefill_engine"),
        ("router", LeastLoaded, "decode_engine"),
    ],
)
def test_the_coordinator_goes_on_after_an_answer_of_a_wrong_type(role, kind, method):
    config = replace(
        CONFIG,
        kv=replace(CONFIG.kv, prefix_cache=True),
        handoff=replace(CONFIG.handoff, rebalance=True, give_back=True),
    )
    made = nonsense_once(kind, method)(PolicySetup(config, LeastLoaded()))
    deployment = deploy(config, stages=(1, 1), policies=make_policies(config, {role: made}))
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
    assert str(error).startswith("policy Forgetful: ") and "=None: must be " in str(error)
    assert [each.state for each in asked] == [State.FINISHED] * 3
    assert [each.output for each in asked] == [expected(each) for each in asked]
    assert not deployment.transport.under_way
