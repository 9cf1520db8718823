"""Policies by name, as "module:Class", as a class or as an object; one of one's own in a file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdjax.config import Config, PoliciesConfig
from pdjax.host.batching.chunks import Chunk
from pdjax.host.policies.admission import AdmitAll
from pdjax.host.policies.api import PolicySetup, StepPlan
from pdjax.host.policies.decode import FcfsDecode
from pdjax.host.policies.evictions.lru import PrefixLru
from pdjax.host.policies.handoff import HandoffRules
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.policies.registry import POLICIES, make_policies
from pdjax.host.policies.router import LeastLoaded
from pdjax.host.sequences.sequence import Sequence
from tests.helpers.deployment import CONFIG, deploy, expected

pytestmark = pytest.mark.smoke


class ShortestFirst(FcfsPrefill):
    """The shortest prompts first: all that a policy of one's own takes."""

    def plan(self, waiting, engines, now):
        return super().plan(sorted(waiting, key=lambda sequence: sequence.length), engines, now)


class OneAtATime:
    """Written from nothing: a prompt a step, the youngest first."""

    def __init__(self, setup: PolicySetup) -> None:
        self.most = setup.config.prefill.token_budget

    def plan(self, waiting, engines, now) -> list[StepPlan]:
        plans, left = [], list(waiting)
        for view in engines:
            sequence = (view.running or left[-1:] or (None,))[0]
            if sequence is None or (sequence in left and not self._fits(sequence, view)):
                continue
            start = sequence.prefilled
            if sequence in left:
                left.remove(sequence)
            stop = min(sequence.length, start + self.most)
            plans.append(StepPlan(view.engine, (Chunk(sequence, start, stop),)))
        return plans

    @staticmethod
    def _fits(sequence: Sequence, view) -> bool:
        return view.buckets.pages_for(sequence.length) <= view.free_pages


class Narrow:
    """No policy."""


def own(name: str) -> str:
    return f"{__name__}:{name}"


def config(**policies: Any) -> Config:
    return replace(CONFIG, policies=PoliciesConfig(**policies))


def test_the_default_policies_have_names():
    policies = make_policies(Config())
    kinds: list[type] = [type(policies.prefill), type(policies.decode)]
    kinds += [type(policies.handoff), type(policies.router)]
    kinds += [type(policies.admission), type(policies.eviction)]
    assert kinds == [FcfsPrefill, FcfsDecode, HandoffRules, LeastLoaded, AdmitAll, PrefixLru]


@pytest.mark.parametrize("how", ["name of a class", "class", "object"])
def test_a_policy_of_ones_own(how):
    if how == "name of a class":
        policies = make_policies(config(prefill=own("ShortestFirst")))
    elif how == "class":
        policies = make_policies(CONFIG, {"prefill": ShortestFirst})
    else:
        made = ShortestFirst(PolicySetup(CONFIG, LeastLoaded()))
        policies = make_policies(CONFIG, {"prefill": made})
        assert policies.prefill is made
    # Not the same class object: this file may have been imported by another name.
    assert type(policies.prefill).__name__ == "ShortestFirst"
    assert type(policies.decode) is FcfsDecode


def order_of_first_tokens(config: Config) -> list[str]:
    """In which order prompts of different lengths have their first tokens."""
    deployment, order = deploy(config), list[str]()
    lengths = {"long": 20, "short": 3, "middle": 9}
    asked = [deployment.submit(name, prompt_len=length) for name, length in lengths.items()]
    while deployment.coordinator.has_work:
        news = deployment.coordinator.step()
        order += [each.sequence.request.id for each in news if each.start == 0]
    assert [each.output for each in asked] == [expected(each) for each in asked]
    return order


@pytest.mark.parametrize(
    ("prefill", "order"),
    [
        ("fcfs", ["long", "short", "middle"]),
        (own("ShortestFirst"), ["short", "middle", "long"]),
        (own("OneAtATime"), ["middle", "short", "long"]),
    ],
)
def test_a_policy_of_ones_own_changes_the_order_and_no_token(prefill, order):
    one_a_step = replace(CONFIG, prefill=replace(CONFIG.prefill, token_budget=4, max_sequences=1))
    changed = replace(one_a_step, policies=PoliciesConfig(prefill=prefill))
    assert order_of_first_tokens(changed) == order


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        (
            {"prefill": "fcsf"},
            r"^policies.prefill='fcsf': allowed are fcfs\b.*, or \"module:Class\"$",
        ),
        (
            {"router": "x"},
            r"^policies.router='x': allowed are least_loaded, round_robin, power_of_two, prefix_"
            r"aware, cost_based, or \"module:Class\"$",
        ),
        ({"handoff": "fcfs"}, r"^policies.handoff='fcfs': allowed are rules, or"),
        (
            {"decode": "no_such_module:Policy"},
            r"^policies.decode='no_such_module:Policy': ModuleNotFoundError: No module named 'no_"
            ".* on Python's path, which for commands includes the current folder$",
        ),
        (
            {"decode": "pdjax.host.policies.decode:Fcsf"},
            r"^policies.decode='pdjax.host.policies.decode:Fcsf': AttributeError: module .* 'Fcsf'",
        ),
        ({"decode": ":Policy"}, r"^policies.decode=':Policy': ValueError: "),
        (
            {"prefill": own("Narrow")},
            r"^policies.prefill='.*:Narrow': called with a PolicySetup: .*takes no arguments$",
        ),
    ],
)
def test_a_policy_that_cannot_be_made_is_refused_in_one_line(policies, message):
    with pytest.raises(ValueError, match=message) as refusal:
        make_policies(config(**policies))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("source", ["x = (", "1 / 0", "import no_such_module"])
def test_a_module_that_cannot_be_imported_is_refused_in_one_line(source, tmp_path, monkeypatch):
    Path(tmp_path, "own_policy.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"^policies.prefill='own_policy:Mine': \w+Error: ") as no:
        make_policies(config(prefill="own_policy:Mine"))
    assert "\n" not in str(no.value)
    assert no.value.__cause__ is not None


def test_what_a_policy_lacks_is_named():
    with pytest.raises(ValueError, match=r"^policies.decode=.*: a decode policy must have the m"):
        make_policies(Config(), {"decode": object()})
    with pytest.raises(ValueError, match=r"^policies='fcfs': must map roles to policies"):
        make_policies(Config(), "fcfs")  # type: ignore[arg-type]
    wanted = "a prefill policy must have the methods plan$"
    with pytest.raises(ValueError, match=wanted):
        make_policies(Config(), {"prefill": LeastLoaded()})

    class Rules(HandoffRules):
        def __init__(self, setup: PolicySetup) -> None:
            """It does not say whether it migrates."""

    with pytest.raises(ValueError, match=r"must have the attributes migrates, returns$"):
        make_policies(Config(), {"handoff": Rules})


def test_a_role_that_does_not_exist_is_refused():
    wanted = f"^policies='routing': allowed are {', '.join(POLICIES)}$"
    with pytest.raises(ValueError, match=wanted):
        make_policies(Config(), {"routing": LeastLoaded})


def test_the_router_of_a_deployment_is_given_to_its_policies():
    router = LeastLoaded()
    policies = make_policies(Config(), {"router": router})
    assert policies.router is router
    assert isinstance(policies.prefill, FcfsPrefill) and policies.prefill._router is router
