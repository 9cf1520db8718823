"""The orders of queues, on made-up sequences."""

import random
from math import inf, nan
from typing import Any, ClassVar

import pytest

from pdjax.config import Config, PoliciesConfig
from pdjax.core.request import MAX_PRIORITY
from pdjax.host.policies.api import PolicySetup
from pdjax.host.policies.orders.earliest_deadline import EarliestDeadline
from pdjax.host.policies.orders.fair import FairPrefill, tenant_of
from pdjax.host.policies.orders.priority import Priority
from pdjax.host.policies.orders.shortest_first import ShortestFirst
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.policies.registry import POLICIES, make_policies
from pdjax.host.policies.router import LeastLoaded
from pdjax.host.sequences.queue import SequenceQueue
from pdjax.host.sequences.sequence import Sequence, State
from tests.helpers.deployment import CONFIG, deploy, expected
from tests.helpers.views import chunks, decode_view, prefill_view, sequence

SETUP = PolicySetup(Config())
POLICY_CONFIG = SETUP.config.policies


def ordered(order: Any, *queue: Sequence) -> list[int]:
    return [each.order for each in sorted(queue, key=order.rank)]


def test_a_second_of_waiting_makes_a_prompt_shorter():
    order, rate = ShortestFirst(SETUP), POLICY_CONFIG.tokens_a_second
    long = sequence(0, 1 + int(rate))
    assert ordered(order, long, sequence(1, 10), sequence(2, 5)) == [2, 1, 0]
    # Of one token come those within a second; then it is the long one's turn.
    soon, late = sequence(1, 1, arrival=0.9), sequence(2, 1, arrival=1.1)
    assert ordered(order, late, long, soon) == [1, 0, 2]


def test_the_earliest_deadline_comes_first_and_none_last():
    order = EarliestDeadline()
    queue = [
        sequence(0, 5),
        sequence(1, 5, asked={"deadline": 9.0}),
        sequence(2, 5, arrival=4.0, asked={"deadline": 3.0}),
        sequence(3, 5),
    ]
    assert ordered(order, *queue) == [2, 1, 0, 3]


def test_a_class_of_priority_is_so_many_seconds():
    order, wait = Priority(SETUP), POLICY_CONFIG.seconds_a_class
    plain = sequence(0, 5)
    soon, late = (
        sequence(i, 5, arrival=at, asked={"priority": -1})
        for i, at in ((1, wait - 1), (2, wait + 1))
    )
    assert ordered(order, late, plain, soon) == [1, 0, 2]
    assert ordered(order, sequence(3, 5, asked={"priority": 2**62}), plain) == [0, 3]


def test_a_priority_beyond_the_classes_is_overtaken_in_time():
    order = Priority(SETUP)
    most = 2 * MAX_PRIORITY * POLICY_CONFIG.seconds_a_class
    least = sequence(0, 5, asked={"priority": 10**9})
    soon, late = (
        sequence(i, 5, arrival=at, asked={"priority": -(10**9)})
        for i, at in ((1, most - 1), (2, most + 1))
    )
    assert ordered(order, late, least, soon) == [1, 0, 2]


def test_infinite_classes_are_strict():
    config = Config(policies=PoliciesConfig(seconds_a_class=inf))
    urgent = sequence(2, 5, arrival=1e6, asked={"priority": -1})
    idle = sequence(1, 5, asked={"priority": 1})
    assert ordered(Priority(PolicySetup(config)), sequence(0, 5), idle, urgent) == [2, 0, 1]


@pytest.mark.parametrize("name", POLICIES["prefill"])
def test_a_prompt_without_room_is_not_overtaken(name):
    policy = POLICIES["prefill"][name](PolicySetup(Config(), LeastLoaded()))
    queue = SequenceQueue.of([sequence(0, 16), sequence(1, 4)], group_of=tenant_of)
    assert policy.plan(queue, [prefill_view(free_pages=3)], 0.0) == []
    [plan] = policy.plan(queue, [prefill_view(free_pages=5)], 0.0)
    assert chunks(plan) == [(0, 0, 10)]


@pytest.mark.parametrize("name", POLICIES["decode"])
def test_no_sequence_overtakes_the_first_into_a_row(name):
    policy = POLICIES["decode"][name](PolicySetup(Config(), LeastLoaded()))
    queue = [sequence(0, 8), sequence(1, 1)]
    assert policy.admit(queue, [decode_view(free_pages=1)], 0.0) == []
    assert [each.sequence.order for each in policy.admit(queue, [decode_view()], 0.0)] == [0, 1]


# Shares.


def fair(**weights: float) -> FairPrefill:
    config = Config(policies=PoliciesConfig(tenant_weights=tuple(weights.items())))
    return FairPrefill(PolicySetup(config, LeastLoaded()))


def of(tenant: str, order: int, tokens: int = 10) -> Sequence:
    return sequence(order, tokens, asked={"labels": {"tenant": tenant}})


def by_tenant(waiting: list[Sequence]) -> SequenceQueue:
    return SequenceQueue.of(waiting, group_of=tenant_of)


def begin(policy: FairPrefill, waiting: list[Sequence], steps: int) -> list[int]:
    """The order in which prompts of 10 tokens begin on an engine that takes one a step."""
    begun = []
    for _ in range(steps):
        [plan] = policy.plan(by_tenant(waiting), [prefill_view()], 0.0)
        [chunk] = plan.chunks
        waiting.remove(chunk.sequence)
        chunk.sequence.state = State.PREFILLING
        begun.append(chunk.sequence.order)
    return begun


def test_tenants_take_turns():
    waiting = [*(of("a", i) for i in range(4)), *(of("b", i) for i in range(4, 8))]
    assert begin(fair(), waiting, 8) == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_tenant_of_twice_the_weight_has_two_turns():
    waiting = [*(of("a", i) for i in range(4)), *(of("b", i) for i in range(4, 8))]
    assert begin(fair(a=2.0), waiting, 6) == [0, 4, 1, 2, 5, 3]


def test_answers_are_charged_too():
    policy, first = fair(), of("a", 0)
    waiting = [first, *(of("b", i) for i in range(1, 5)), of("a", 9)]
    assert begin(policy, waiting, 1) == [0]
    first.output = [1] * 15  # 30 more: three turns of b
    assert begin(policy, waiting, 5) == [1, 2, 3, 4, 9]
    assert policy.served("a") == 10 + 30 + 10


def test_an_idle_time_gives_no_credit():
    policy = fair()
    waiting = [of("a", i) for i in range(10)]
    begin(policy, waiting, 8)
    waiting += [of("b", i) for i in range(10, 14)]
    assert begin(policy, waiting, 4) == [8, 10, 9, 11]


def test_a_plan_that_was_not_carried_out_is_not_charged():
    policy, waiting = fair(), [of("a", 0), of("b", 1)]
    for _ in range(3):
        [plan] = policy.plan(by_tenant(waiting), [prefill_view()], 0.0)
        assert chunks(plan) == [(0, 0, 10)]
    assert policy.served("a") == 10


def test_a_prompt_that_is_computed_again_is_charged_once():
    policy, waiting = fair(), [of("a", 0), of("a", 1)]
    first = waiting[0]
    begin(policy, waiting, 1)
    first.output = [7]
    first.state = State.WAITING
    waiting.insert(0, first)
    begin(policy, waiting, 1)
    assert policy.served("a") == 10 + 2


def test_tenants_that_have_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pdjax.host.policies.orders.fair._MOST_IDLE", 100)
    policy = fair()
    for i in range(350):
        asked = of(f"t{i}", i)
        begin(policy, [asked], 1)
        asked.state, asked.done = State.FINISHED, True
    assert len(policy._counters) < 300
    assert len(policy._begun) < 300


class PlainFair(FcfsPrefill):
    """Virtual token counters by a walk over all that waits and all that has begun."""

    def __init__(self, setup: PolicySetup) -> None:
        super().__init__(setup)
        self.weights = dict(setup.config.policies.tenant_weights)
        self.counters: dict[str, float] = {}
        self.begun: dict[Sequence, tuple[int, int]] = {}
        self.queued: set[str] = set()
        self.last = ""

    def charge(self, tenant: str, tokens: float) -> None:
        self.counters[tenant] = self.served(tenant) + tokens / self.weights.get(tenant, 1.0)

    def served(self, tenant: str) -> float:
        return self.counters.get(tenant, 0.0)

    def plan(self, waiting, engines, now):
        for each, (prompt, written) in list(self.begun.items()):
            if each.state is State.WAITING and not each.output:
                self.charge(tenant_of(each), -prompt)
                del self.begun[each]
                continue
            self.charge(tenant_of(each), 2.0 * (len(each.output) - written))
            self.begun[each] = prompt, len(each.output)
            if each.done:
                del self.begun[each]
        queues: dict[str, list[Sequence]] = {}
        for each in waiting:
            queues.setdefault(tenant_of(each), []).append(each)
        gone, stayed = self.queued - queues.keys(), self.queued & queues.keys()
        if gone:
            self.last = max(gone, key=lambda name: (self.served(name), name))
        least = min(map(self.served, stayed), default=self.served(self.last))
        for tenant in queues.keys() - self.queued:
            self.counters[tenant] = max(self.served(tenant), least)
        self.queued = set(queues)
        draft = self.draft(engines, now)
        while queues:
            tenant = min(queues, key=lambda name: (self.counters[name], queues[name][0].order))
            first = queues[tenant].pop(0)
            tokens = self.place(first, draft)
            if not tokens:
                break
            if first not in self.begun:
                self.begun[first] = tokens, len(first.output)
                self.charge(tenant, tokens)
            if not queues[tenant]:
                del queues[tenant]
        return list(draft.plans())


@pytest.mark.parametrize("seed", range(8))
def test_shares_are_those_of_a_walk_over_the_queue(seed):
    chance, order = random.Random(seed), 0
    weights = PoliciesConfig(tenant_weights=(("a", 2.0), ("b", 0.5)))
    setup = PolicySetup(Config(policies=weights), LeastLoaded())
    policy, plain = FairPrefill(setup), PlainFair(setup)
    policy._prune_begun_at = 5
    queue, running = SequenceQueue(tenant_of), list[Sequence]()
    for _ in range(80):
        for _ in range(chance.choice((0, 0, 1, 3))):
            made = of(chance.choice("abcd"), order, chance.randint(1, 12))
            queue.add(made, made.order)
            order += 1
        view = prefill_view(free_pages=chance.randint(1, 8))
        plans = policy.plan(queue, [view], 0.0)
        assert plans == plain.plan(list(queue), [view], 0.0)
        assert all(policy.served(tenant) == plain.served(tenant) for tenant in "abcd")
        for each in [chunk.sequence for plan in plans for chunk in plan.chunks]:
            if chance.random() < 0.8:  # is carried out
                queue.remove(each)
                each.state = State.PREFILLING
                running.append(each)
        for each in list(running):
            if chance.random() < 0.6:
                each.output.append(7)
            if chance.random() < 0.2:  # ends, or is preempted
                running.remove(each)
                each.done = chance.random() < 0.6
                each.state = State.FINISHED if each.done else State.WAITING
                if not each.done:
                    queue.add(each, each.order)


def test_whose_a_request_is():
    labels = {"user": "u", "api_key": "k"}
    assert tenant_of(sequence(0, 1, asked={"labels": labels})) == "k"
    assert tenant_of(sequence(0, 1, asked={"labels": {**labels, "tenant": "t"}})) == "t"
    assert tenant_of(sequence(0, 1)) == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("seconds_a_class", bad) for bad in (-1.0, nan)),
        *(("tokens_a_second", bad) for bad in (-1.0, nan, inf)),
        *(("output_weight", bad) for bad in (-0.5, inf)),
        ("imbalance_steps", -1.0),
        ("imbalance_rows", nan),
    ],
)
def test_weights_of_orders_are_checked(name, value):
    with pytest.raises(ValueError, match=rf"^policies.{name}={value}: must be a number, 0 or more"):
        PoliciesConfig(**{name: value})


@pytest.mark.parametrize("weights", [("a", 1.0), (("a", 0.0),), (("a", nan),), ((1, 1.0),)])
def test_weights_are_checked(weights):
    with pytest.raises(ValueError, match=r"^policies.tenant_weights="):
        PoliciesConfig(tenant_weights=weights)


# In the coordinator.


class Ranks(FcfsPrefill):
    """By what a test says."""

    ranks: ClassVar[dict[str, Any]] = {}

    def rank(self, sequence: Sequence) -> Any:
        return self.ranks[sequence.request.id]


def test_the_queue_is_kept_in_the_order_of_the_policy():
    deployment = deploy(CONFIG, policies=make_policies(CONFIG, {"prefill": Ranks}))
    Ranks.ranks = {"a": 2, "b": 1, "c": 1.5}
    for name in "abc":
        deployment.submit(name, prompt_len=4)
    waiting = deployment.coordinator.loop.lifecycle.waiting
    assert [each.request.id for each in waiting] == ["b", "c", "a"]


@pytest.mark.parametrize("rank", [None, "x", nan, (1, nan), (1, 2)])
def test_a_rank_that_is_none_ends_its_request_alone(rank):
    deployment = deploy(CONFIG, policies=make_policies(CONFIG, {"prefill": Ranks}))
    Ranks.ranks = {"good": 1, "bad": rank, "other": 2}
    good = deployment.submit("good", prompt_len=4)
    bad = deployment.submit("bad", prompt_len=4)
    other = deployment.submit("other", prompt_len=4)
    deployment.run()
    assert (good.output, other.output) == (expected(good), expected(other))
    assert bad.state is State.FAILED and bad.error
    if rank != (1, 2):  # else it can't be compared with the others'
        assert "BadPlan: policy Ranks: rank of bad#0" in bad.error
