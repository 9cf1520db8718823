"""A tier below a tier: what goes down both, comes up both, is known from the start, or is lost."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import Config, KVConfig, PoliciesConfig, TiersConfig
from pdjax.core.ids import PoolId
from pdjax.host.kv.eviction import TailsFirst
from pdjax.host.kv.pages import PageAllocator
from pdjax.host.kv.pools import PoolState
from pdjax.host.policies.registry import make_policies
from pdjax.host.policies.tiering import AlwaysLoad
from pdjax.host.policies.tiering_api import LoadChoice
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.host.tiers.account import TierTotals
from pdjax.interfaces.transport import KeptPage, LostPages
from pdjax.sim.cluster import Cluster
from pdjax.workloads.arrival import Arrival, Piece
from tests.helpers.deployment import LAYOUT, Deployment, assemble
from tests.helpers.fake_engines import FakeDecodeEngine, FakePrefillEngine
from tests.helpers.fakes import Chance, FakePool, InjectedError
from tests.host.test_tiers import CACHED, FIRST, HOST, OTHER, ask, pool_of

DISK = PoolId("disk/0")
THIRD, FOURTH = tuple(range(2, 31)), tuple(range(31, 2, -1))
KEYS = [bytes([place]) * 16 for place in range(8)]


def tiered(*, pages: int = 15, **further: Any) -> Deployment:
    """A prefill engine of 8 pages, a tier of so many less one, and a larger one below that."""
    chance = Chance(0, max_delay=0)
    prefill = FakePrefillEngine(LAYOUT, 9, chance)
    decode = FakeDecodeEngine(LAYOUT, 40, CACHED.decode.rows, chance, name="decode/0")
    tiers = [FakePool(HOST, LAYOUT, pages), FakePool(DISK, LAYOUT, 40)]
    return assemble([prefill, decode], chance, CACHED, tiers=tiers, **further)


def totals(deployment: Deployment, tier: PoolId) -> TierTotals:
    return deployment.coordinator.loop.tiers.totals[tier]


def sunk(**further: Any) -> Deployment:
    """The KV of the first of four prompts lies in the lowest tier alone."""
    deployment = tiered(**further)
    for number, prompt in enumerate((FIRST, OTHER, THIRD, FOURTH)):
        ask(deployment, f"before {number}", prompt)
    return deployment


def loading(deployment: Deployment) -> Sequence:
    """A sequence that waits for the 7 pages of the first prompt."""
    sequence = deployment.submit("again", prompt=FIRST, max_tokens=2)
    deployment.run_until(lambda: sequence.state is State.LOADING)
    return sequence


def test_what_the_upper_tier_evicts_goes_down_once_and_comes_up_through_it():
    deployment = sunk()
    assert totals(deployment, DISK).down_pages > 0 and totals(deployment, DISK).up_pages == 0
    assert ask(deployment, "again").cached_tokens == 28
    assert totals(deployment, DISK).up_pages == totals(deployment, HOST).up_pages == 7
    for number in range(2):
        for prompt in (OTHER, THIRD, FOURTH, FIRST):
            assert ask(deployment, f"{number} {prompt[0]}", prompt).cached_tokens == 28
    told = totals(deployment, DISK)
    assert told.down_pages == 28 and told.refreshed_pages > 0, "each page goes down once"
    assert told.failed_loads == told.failed_pages == told.refused_pages == 0
    for name in ("hbm/prefill-0", HOST, DISK):
        assert pool_of(deployment, name).allocator.used_pages == 0


def test_as_much_comes_up_as_the_upper_tier_has_room_for():
    deployment = sunk(pages=6)
    found = ask(deployment, "again").cached_tokens
    assert found == 20 == 4 * totals(deployment, HOST).up_pages


def lost_page(deployment: Deployment, sequence: Sequence) -> None:
    page = sequence.handoff.pages[2].page
    for ticket in deployment.transport.under_way.values():
        ticket._error = LostPages((page,))


def broken(deployment: Deployment, sequence: Sequence) -> None:
    for ticket in deployment.transport.under_way.values():
        ticket._error = InjectedError("ticket")


@pytest.mark.parametrize(("trouble", "kept"), [(lost_page, 6), (broken, 7)])
def test_what_does_not_come_up_is_computed_and_what_is_lost_is_forgotten(
    trouble: Callable[..., None], kept: int
):
    deployment = sunk()
    sequence = loading(deployment)
    index = pool_of(deployment, DISK).prefixes
    assert index is not None and sequence.handoff.tier.id == DISK
    trouble(deployment, sequence)
    deployment.run_until(lambda: sequence.state is not State.LOADING)
    keys = sequence.page_keys[4][:7]
    assert sum(index.page_of(key) is not None for key in keys) == kept
    deployment.run()
    assert sequence.cached_tokens == 0 and totals(deployment, DISK).failed_loads == 1
    for number, prompt in enumerate((OTHER, THIRD, FOURTH)):
        ask(deployment, f"between {number}", prompt)
    assert ask(deployment, "once more").cached_tokens == 28


def test_a_policy_is_asked_of_the_whole_way():
    asked = list[LoadChoice]()

    class Asked(AlwaysLoad):
        def loads(self, choice: LoadChoice, now: float) -> bool:
            asked.append(choice)
            return super().loads(choice, now)

    deployment = sunk(policies=make_policies(CACHED, {"tiering": Asked}))
    for number, prompt in enumerate((FIRST, OTHER)):
        ask(deployment, f"again {number}", prompt)
    tiers = [choice.tier for choice in asked if choice.sequence.id.startswith("again")]
    assert tiers == [DISK, HOST, DISK, HOST]
    assert {choice.tokens for choice in asked} == {28}
    assert asked[0].load_seconds is None and asked[2].load_seconds is not None


def test_a_pool_may_hold_pages_from_the_start():
    kept = [KeptPage(KEYS[place], place, page) for place, page in ((3, 5), (2, 4), (0, 7))]
    pool = PoolState.of(DISK, LAYOUT, 9, TailsFirst(), kept=kept)
    index, allocator = pool.prefixes, pool.allocator
    assert index is not None and index.match([KEYS[0]]) == [7]
    assert (allocator.cached_pages, allocator.free_pages) == (3, 8)
    assert sorted(allocator.allocate(5)) == [1, 2, 3, 6, 8]
    assert [allocator.allocate(1) for _ in range(3)] == [[5], [4], [7]]
    assert index.page_of(KEYS[0]) is None
    assert PoolState.of(DISK, LAYOUT, 9, None, kept=kept).allocator.cached_pages == 0


@pytest.mark.parametrize("pages", [[1, 1], [0], [9], [2, 3]])
def test_pages_that_are_not_free_are_not_claimed(pages: list[int]):
    allocator = PageAllocator(9)
    allocator.claim([3])
    with pytest.raises(ValueError, match=r"pages=.*: must be free, and each named once"):
        allocator.claim(pages)
    assert allocator.free_pages == 7


def test_a_simulated_cluster_has_both_tiers():
    """Prompts that take turns in a host tier with room for two, above a disk."""
    config = Config(
        kv=KVConfig(page_size=64, prefix_cache=True),
        policies=PoliciesConfig(tiering="always"),
        tiers=TiersConfig(
            host_gb=0.135, disk_folder="/nowhere", disk_gb=1, bytes_in_flight=1 << 30
        ),
    )
    config = replace(config, prefill=replace(config.prefill, pages=10))
    cluster = Cluster(config, max_model_len=600)
    cluster.expect(
        Arrival(float(i), 513, 1, pieces=(Piece(key, 513),)) for i, key in enumerate("abcdabcd")
    )
    cluster.run()
    told = cluster.coordinator.loop.tiers.totals
    assert told[HOST].hit_tokens == 4 * 512 and told[DISK].hit_tokens == 4 * 512
