"""Which cached pages go first, by each policy, and what happens when an order is wrong."""

from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import KVConfig, PoliciesConfig
from pdjax.core.recompute import RecomputeCost
from pdjax.host.kv.eviction import BadEviction, TailsFirst
from pdjax.host.kv.pages import PageAllocator
from pdjax.host.kv.prefix_index import PrefixIndex
from pdjax.host.policies.evictions.aged import AgedOrder, CostAware, Lfu
from pdjax.host.policies.evictions.lru import Lru, PrefixLru
from pdjax.host.policies.registry import make_policies
from pdjax.host.sequences.sequence import State
from tests.helpers.deployment import CONFIG, LAYOUT, deploy, expected

COST = RecomputeCost(token=1.0, position=1.0)


class Pool:
    """A pool under a policy, of sequences that are named by their tokens."""

    def __init__(self, policy: Any, pages: int) -> None:
        self.allocator = PageAllocator(pages + 1, policy().order(LAYOUT, COST))
        self.index = PrefixIndex(self.allocator, 1)

    def use(self, *tokens: int) -> None:
        """Take what is there of a sequence, compute the rest, and let go of it."""
        keys = self.index.keys(tokens)
        found = self.index.take(keys, len(tokens))
        pages = found + self.allocator.allocate(len(tokens) - len(found))
        self.index.insert(keys, pages, len(tokens))
        self.allocator.free(pages)
        self.allocator.check([])

    def kept(self, *tokens: int) -> int:
        """How many pages of a sequence can be found."""
        return len(self.index.match(self.index.keys(tokens)))

    def need(self, pages: int) -> None:
        """Let so many pages be in use for a moment."""
        self.allocator.free(self.allocator.allocate(pages))


@pytest.mark.parametrize("policy", [PrefixLru, Lfu, CostAware])
def test_a_sequence_is_evicted_from_its_end(policy):
    pool = Pool(policy, 4)
    pool.use(1, 2, 3, 4)
    for left in (3, 2, 1, 0):
        pool.need(4 - left)
        assert pool.kept(1, 2, 3, 4) == left


def test_the_textbooks_lru_evicts_the_beginning_first():
    pool = Pool(Lru, 4)
    pool.use(1, 2, 3, 4)
    pool.need(1)
    assert pool.kept(1, 2, 3, 4) == 0
    assert pool.allocator.cached_pages == 3


@pytest.mark.parametrize("policy", [PrefixLru, Lru])
def test_by_the_last_use(policy):
    pool = Pool(policy, 2)
    for token in (1, 2, 1, 3):
        pool.use(token)
    assert (pool.kept(1), pool.kept(2), pool.kept(3)) == (1, 0, 1)


def test_by_how_often_it_was_used():
    pool = Pool(Lfu, 2)
    for token in (1, 1, 1, 2, 3, 4):
        pool.use(token)
    assert (pool.kept(1), pool.kept(4)) == (1, 1)


def test_what_was_popular_once_goes_at_last():
    pool = Pool(Lfu, 2)
    for _ in range(10):
        pool.use(1)
    for token in range(2, 12):
        pool.use(token)
        assert pool.kept(1) == 1
    pool.use(12)
    assert pool.kept(1) == 0


def test_uses_beside_other_holders_count():
    """A page that always had a holder was never cached in between."""
    pool = Pool(Lfu, 2)
    keys, pages = pool.index.keys([1]), pool.allocator.allocate(1)
    pool.index.insert(keys, pages, 1)
    for _ in range(3):
        pool.index.take(keys, 1)
    pool.allocator.free(pages * 4)
    for token in (2, 2, 3, 4):
        pool.use(token)
    assert pool.kept(1) == 1


def test_what_costs_more_to_compute_stays_longer():
    pool = Pool(CostAware, 7)
    pool.use(1, 2, 3, 4, 5)
    pool.use(6)
    pool.use(7)
    pool.need(2)
    assert (pool.kept(1, 2, 3, 4, 5), pool.kept(6), pool.kept(7)) == (5, 0, 0)
    pool.need(3)
    assert pool.kept(1, 2, 3, 4, 5) == 4


def test_flops_of_tokens():
    assert COST.flops(0, 1) == 1.0
    assert COST.flops(2, 4) == 2 * 1.0 + 2.0 + 3.0
    assert COST.flops(0, 4) == COST.flops(0, 2) + COST.flops(2, 4)
    with pytest.raises(ValueError, match=r"recompute\.position=-1"):
        RecomputeCost(1.0, -1.0)


def test_a_policy_that_needs_the_models_flops_says_so():
    config = replace(
        CONFIG, kv=KVConfig(prefix_cache=True), policies=PoliciesConfig(eviction="cost_aware")
    )
    with pytest.raises(ValueError, match=r'policies\.eviction="cost_aware": needs the FLOPs'):
        deploy(config)
    assert deploy(config, recompute=COST).submit("a").state is State.WAITING


def test_a_heap_forgets_what_does_not_count_any_longer():
    order = AgedOrder(lambda uses, place: uses)
    order.know({1: 0, 2: 1})
    for _ in range(1000):
        order.cache([1, 2])
        order.take([1, 2])
    assert len(order._heap) < 100
    order.cache([1, 2])
    order.drop([1, 7])
    assert order.evict(1) == [2]


class InUse(TailsFirst):
    """Names a page that has a holder, once."""

    bad = True

    def evict(self, count: int) -> list[int]:
        pages = super().evict(count)
        if InUse.bad:
            InUse.bad = False
            return [*pages[1:], 39]
        return pages


class Wrong(PrefixLru):
    def order(self, layout, recompute=None):
        return InUse()


@pytest.mark.parametrize("answer", [[1], [2, 2], [2, 9], (2, 3), None])
def test_a_wrong_order_is_refused_and_nothing_is_taken(answer, monkeypatch):
    allocator = PageAllocator(4)
    held, *cached = allocator.allocate(3)
    allocator.know({page: place for place, page in enumerate(cached)})
    allocator.free(cached)
    monkeypatch.setattr(TailsFirst, "evict", lambda self, count: answer)
    with pytest.raises(
        BadEviction, match=r"eviction order TailsFirst: .*must be a list of 2 cached"
    ):
        allocator.allocate(2)
    assert (allocator.free_pages, allocator.used_pages) == (2, 1)
    allocator.check([held])


def test_the_coordinator_goes_on_after_a_wrong_order():
    InUse.bad = True
    config = replace(CONFIG, kv=KVConfig(prefix_cache=True))
    policies = make_policies(config, {"eviction": Wrong})
    deployment = deploy(config, pages=(12, 12), policies=policies)
    asked = [
        deployment.submit(name, prompt=tuple(range(start, start + 20)), max_tokens=5)
        for name, start in (("a", 1), ("b", 2), ("c", 3))
    ]
    with pytest.raises(BadEviction, match="eviction order InUse"):
        deployment.run()
    deployment.run()
    assert [each.output for each in asked] == [expected(each) for each in asked]
