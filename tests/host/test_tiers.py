"""Tiers below pools: what goes down and comes up, and what follows when something goes wrong."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import Config, KVConfig, PoliciesConfig, TiersConfig
from pdjax.core.ids import PoolId
from pdjax.host.kv.pools import PoolState
from pdjax.host.policies.api import PolicySetup
from pdjax.host.policies.check import BadPlan
from pdjax.host.policies.registry import make_policies
from pdjax.host.policies.tiering import LoadByCost
from pdjax.host.policies.tiering_api import LoadChoice
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.host.tiers.account import TierTotals
from pdjax.host.tiers.moves import Moves
from pdjax.sim.cluster import Cluster
from pdjax.sim.links import Link
from pdjax.workloads.arrival import Arrival, Piece
from tests.helpers.deployment import CONFIG, LAYOUT, Deployment, assemble, expected
from tests.helpers.fake_engines import FakeDecodeEngine, FakePrefillEngine
from tests.helpers.fakes import Chance, FakePool, InjectedError

HOST = PoolId("host/0")
CACHED = replace(
    CONFIG,
    kv=KVConfig(page_size=4, prefix_cache=True),
    policies=PoliciesConfig(tiering="always"),
)
FIRST, OTHER = tuple(range(1, 30)), tuple(range(30, 1, -1))
"""Two prompts of 7 whole pages each, for a pool of 8."""


def tiered(config: Config = CACHED, *, pages: int = 40, **further: Any) -> Deployment:
    """A prefill engine of 8 pages, a decode engine, and a tier below the pools of both."""
    chance = Chance(0, max_delay=0)
    prefill = FakePrefillEngine(LAYOUT, 9, chance)
    decode = FakeDecodeEngine(LAYOUT, 40, config.decode.rows, chance, name="decode/0")
    tier = FakePool(HOST, LAYOUT, pages)
    return assemble([prefill, decode], chance, config, tiers=[tier], **further)


def ask(deployment: Deployment, name: str, prompt: tuple[int, ...] = FIRST) -> Sequence:
    """Let a request come to its end."""
    sequence = deployment.submit(name, prompt=prompt, max_tokens=2)
    deployment.run()
    assert sequence.output == expected(sequence), sequence.error
    return sequence


def loading(deployment: Deployment) -> Sequence:
    """A sequence that waits for 7 pages: they have gone down, and do not arrive before they are
    let."""
    ask(deployment, "before")
    ask(deployment, "between", OTHER)
    sequence = deployment.submit("again", prompt=FIRST, max_tokens=2)
    deployment.run_until(lambda: sequence.state is State.LOADING)
    return sequence


def totals(deployment: Deployment) -> TierTotals:
    return deployment.coordinator.loop.tiers.totals[HOST]


def pool_of(deployment: Deployment, name: str) -> PoolState:
    return deployment.coordinator.loop.fleet.pools[PoolId(name)]


def test_what_a_pool_evicts_goes_down_once_and_comes_up_as_often_as_it_is_needed():
    deployment = tiered()
    ask(deployment, "before")
    assert totals(deployment) == TierTotals(down_pages=7, down_bytes=7 * LAYOUT.page_bytes)
    for turn in range(3):
        assert ask(deployment, f"between {turn}", OTHER).cached_tokens == (28 if turn else 0)
        assert ask(deployment, f"again {turn}").cached_tokens == 28
    told = totals(deployment)
    assert told.hit_tokens == 4 * told.up_pages > 100
    assert told.down_pages == 14 and told.refreshed_pages > 0, "each page goes down once"
    assert told.up_bytes == told.up_pages * LAYOUT.page_bytes
    assert told.refused_pages == told.failed_pages == told.failed_loads == 0
    assert pool_of(deployment, "host/0").allocator.used_pages == 0


def test_what_would_find_no_room_on_the_way_has_gone_down_before():
    deployment = tiered(replace(CACHED, tiers=TiersConfig(bytes_in_flight=1)))
    loading(deployment)
    deployment.run()
    assert totals(deployment).hit_tokens == 28 and totals(deployment).refused_pages == 0


def test_what_finds_no_room_in_the_tier_is_lost_to_it():
    deployment = tiered(pages=4)
    ask(deployment, "before")
    ask(deployment, "between", OTHER)
    assert ask(deployment, "again").cached_tokens <= 12
    assert pool_of(deployment, "host/0").allocator.cached_pages == 3


def test_an_abort_lets_go_of_everything():
    deployment = tiered()
    sequence = loading(deployment)
    assert pool_of(deployment, "hbm/prefill-0").allocator.used_pages == 7
    deployment.coordinator.abort("again")
    assert sequence.state is State.ABORTED
    assert pool_of(deployment, "hbm/prefill-0").allocator.used_pages == 0
    deployment.coordinator.check()
    deployment.run()
    assert pool_of(deployment, "host/0").allocator.used_pages == 0
    assert not deployment.transport.under_way


def test_what_was_on_its_way_for_an_aborted_sequence_is_not_written_to_its_pages_next_holder():
    deployment = tiered()
    loading(deployment)
    [job] = deployment.transport.under_way.values()
    job._asks_left = 4  # it arrives while the other one is computed
    other = deployment.submit("other", prompt=tuple([1] * 29), max_tokens=2)
    deployment.coordinator.abort("again")
    assert not deployment.transport.under_way
    deployment.run()
    assert other.output == expected(other) and other.cached_tokens == 0
    again = ask(deployment, "other again", tuple([1] * 29))
    assert again.cached_tokens == 28, "its pages were found, and right"


def test_what_waits_for_room_on_the_way_leaves_when_an_abort_makes_some():
    """Nothing else happens: what was on its way never arrives."""
    deployment = two_loads()
    first, second = deployment.coordinator.loop.lifecycle.loading
    deployment.coordinator.abort(first.request.id)
    deployment.run()
    assert second.output == expected(second) and second.cached_tokens == 12


def test_what_waits_for_room_on_the_way_leaves_when_what_was_there_is_given_up():
    deployment = two_loads()
    first, second = deployment.coordinator.loop.lifecycle.loading
    deployment.clock.advance_to(deployment.clock.now() + 100)
    deployment.run()
    assert first.output == expected(first) and first.cached_tokens == 0
    assert second.output == expected(second) and second.cached_tokens == 12


def two_loads() -> Deployment:
    """Two sequences wait for 3 pages each. Those of one are on their way, and lost."""
    page = LAYOUT.page_bytes
    deployment = tiered(replace(CACHED, tiers=TiersConfig(bytes_in_flight=4 * page)))
    prompts = FIRST[:13], OTHER[:13]
    for name, prompt in zip("ab", prompts, strict=True):
        ask(deployment, name, prompt)
    for turn in range(2):  # both go down
        ask(deployment, f"between {turn}", tuple([20 + turn] * 29))
    for name, prompt in zip("cd", prompts, strict=True):
        deployment.submit(name, prompt=prompt, max_tokens=2)
    deployment.run_until(lambda: len(deployment.coordinator.loop.lifecycle.loading) == 2)
    for ticket in deployment.transport.under_way.values():
        ticket._lost = True
    assert [load.unsent for load in deployment.coordinator.loop.tiers._loads] == [0, 3]
    return deployment


def broken_send(deployment: Deployment, sequence: Sequence) -> None:
    """What has left does not arrive whole."""
    for ticket in deployment.transport.under_way.values():
        ticket._error = InjectedError("ticket")


def lost_pool(deployment: Deployment, sequence: Sequence) -> None:
    pool = deployment.prefill[0].pages
    pool.contents[:] = 0
    pool.losses += 1


def never_arrives(deployment: Deployment, sequence: Sequence) -> None:
    for ticket in deployment.transport.under_way.values():
        ticket._lost = True
    deployment.clock.advance_to(deployment.clock.now() + 100)


def found_wrong(deployment: Deployment, sequence: Sequence) -> None:
    """A page turns out not to hold what it was said to."""
    index = pool_of(deployment, "hbm/prefill-0").prefixes
    assert index is not None
    index.forget_key(sequence.page_keys[4][3])


@pytest.mark.parametrize("trouble", [broken_send, lost_pool, never_arrives, found_wrong])
def test_what_does_not_come_up_is_computed(trouble: Callable[..., None]):
    deployment = tiered()
    sequence = loading(deployment)
    trouble(deployment, sequence)
    deployment.run()
    assert sequence.output == expected(sequence) and sequence.cached_tokens == 0
    assert totals(deployment).failed_loads == 1
    assert not deployment.transport.under_way


def test_a_turn_that_is_broken_off_leaves_nothing_on_its_way(monkeypatch):
    deployment = tiered()
    sequence = loading(deployment)

    def interrupted(self: Moves, job_id: int) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Moves, "job_arrived", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deployment.run()
    assert sequence.state is State.WAITING and not deployment.transport.under_way
    deployment.run()
    assert sequence.output == expected(sequence)


def test_a_policy_may_let_it_be_computed():
    class Never(LoadByCost):
        def loads(self, choice: LoadChoice, now: float) -> bool:
            return False

    deployment = tiered(policies=make_policies(CACHED, {"tiering": Never}))
    ask(deployment, "before")
    ask(deployment, "between", OTHER)
    assert ask(deployment, "again").cached_tokens == 0
    assert totals(deployment).recomputed_tokens == 28 and totals(deployment).up_pages == 0


def test_an_answer_that_is_none_is_refused():
    class Perhaps:
        def __init__(self, setup: PolicySetup) -> None:
            """See `PolicySetup`."""

        def loads(self, choice: LoadChoice, now: float) -> str:
            return "perhaps"

    deployment = tiered(policies=make_policies(CACHED, {"tiering": Perhaps}))
    ask(deployment, "before")
    ask(deployment, "between", OTHER)
    deployment.submit("again", prompt=FIRST, max_tokens=2)
    with pytest.raises(BadPlan, match=r"policy Perhaps: loads of again#0='perhaps': must be True"):
        deployment.run()


@pytest.mark.parametrize(("bandwidth", "loads"), [(40e9, True), (1e9, False)])
def test_the_policy_loads_where_that_is_sooner_than_to_compute(bandwidth: float, loads: bool):
    """4,096 tokens of Llama 3 8B are 0.54 GB. Simulated steps compute them in 93 ms: a link of 5.8
    GB/s would be as fast. What is not known is tried once."""
    config = Config(
        kv=KVConfig(page_size=64, prefix_cache=True),
        tiers=TiersConfig(host_gb=4, bytes_in_flight=1 << 30),
    )
    config = replace(config, prefill=replace(config.prefill, pages=66))
    cluster = Cluster(config, max_model_len=5000, host_link=Link(bandwidth, 1e-5))
    cluster.expect(
        Arrival(float(i), 4097, 1, pieces=(Piece(key, 4097),)) for i, key in enumerate("abab")
    )
    cluster.run()
    told = cluster.coordinator.loop.tiers.totals[HOST]
    assert (told.recomputed_tokens == 0) is loads
    assert told.hit_tokens == 4096 * (2 if loads else 1)
