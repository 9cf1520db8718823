"""Pools in any mixture: engines that share one, engines with one of their own, of other sizes."""

from dataclasses import replace
from typing import Any

import pytest

from pdjax.config import HandoffConfig, KVConfig
from pdjax.core.kv_layout import KVLayout
from pdjax.host.policies.decode import FcfsDecode
from pdjax.host.policies.registry import make_policies
from pdjax.host.sequences.sequence import Sequence, State
from tests.helpers.deployment import CONFIG, LAYOUT, Deployment, assemble, expected
from tests.helpers.fake_engines import FakeDecodeEngine, FakeEngine, FakePrefillEngine
from tests.helpers.fakes import Chance


def engines(
    chance: Chance, *, shared_rows: int = 2, own_rows: int = 2, page_size: int = 4, pages: int = 40
) -> tuple[FakePrefillEngine, FakeDecodeEngine, FakeDecodeEngine]:
    """A prefill engine, a decode engine on its pool, and one with a pool of its own."""
    prefill = FakePrefillEngine(LAYOUT, pages, chance)
    beside = FakeDecodeEngine(LAYOUT, 0, shared_rows, chance, name="decode/0", pages=prefill.pages)
    layout = replace(LAYOUT, page_size=page_size)
    own = FakeDecodeEngine(layout, 40, own_rows, chance, name="decode/1")
    return prefill, beside, own


def mixed(config: Any = CONFIG, **how: Any) -> Deployment:
    chance = Chance(0, max_delay=0)
    return assemble(list(engines(chance, **how)), chance, config)


def where(sequence: Sequence) -> tuple[str | None, str | None]:
    return sequence.engine, sequence.pool


def test_a_sequence_decodes_in_the_shared_pool_without_moving_and_moves_when_it_has_no_rows():
    deployment = mixed(shared_rows=1)
    first = deployment.submit("first", prompt_len=6, max_tokens=12)
    deployment.run_until(lambda: first.state is State.DECODING)
    assert where(first) == ("decode/0", "hbm/prefill-0")
    pages = list(first.pages)
    others = [deployment.submit(name, prompt_len=6, max_tokens=12) for name in "ab"]
    deployment.run_until(lambda: all(each.state is State.DECODING for each in others))
    assert [where(each) for each in others] == [("decode/1", "hbm/decode-1")] * 2
    assert first.pages[: len(pages)] == pages
    deployment.run()
    assert [each.output for each in (first, *others)] == [
        expected(each) for each in (first, *others)
    ]
    assert {(job.source, job.target) for job in deployment.transport.jobs} == {
        ("hbm/prefill-0", "hbm/decode-1")
    }
    assert deployment.recorder.request(first).transfer.transfers == 0
    assert [deployment.recorder.request(each).transfer.transfers for each in others] == [1, 1]


def test_the_account_of_a_shared_pool_counts_every_engine():
    deployment = mixed(shared_rows=1)
    prefill, beside, own = (
        deployment.coordinator.loop.fleet.engines[each.id]
        for each in (deployment.prefill[0], *deployment.decode)
    )
    assert prefill.pool is beside.pool is not own.pool
    assert len(deployment.coordinator.loop.fleet.pools) == 2
    here = deployment.submit("here", prompt_len=6, max_tokens=12)
    deployment.run_until(lambda: here.state is State.DECODING)
    there = deployment.submit("there", prompt_len=17, max_tokens=5)
    deployment.run_until(lambda: there.state is State.PREFILLING)
    loop = deployment.coordinator.loop
    assert set(loop.lifecycle.holders(prefill.pool)) == {here, there}
    assert prefill.allocator.used_pages == len(here.pages) + len(there.pages)
    # Room for the one that is prefilled is held ahead in the other pool.
    assert own.allocator.used_pages == 5 and own.rows.taken_rows == 1
    (view,) = loop.fleet.views([prefill])
    assert (view.rows_of_pool, view.rows) == (1, 0)
    assert loop.fleet.views([beside])[0].free_pages == view.free_pages
    deployment.run()
    for pool in loop.fleet.pools.values():
        assert (pool.allocator.used_pages, pool.allocator.free_pages) == (0, pool.allocator.total)
    assert beside.rows.taken_rows == own.rows.taken_rows == 0


@pytest.mark.parametrize("page_size", [2, 4, 6, 8])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_mixture_under_load(page_size, prefix_cache):
    """With few pages there are preemptions, too."""
    config = replace(
        CONFIG,
        kv=KVConfig(prefix_cache=prefix_cache),
        handoff=HandoffConfig(give_back=prefix_cache, rebalance=True),
        max_waiting=20,
    )
    deployment = mixed(config, page_size=page_size, pages=14)
    asked = [deployment.submit(f"{i}", prompt_len=3 + 2 * i, max_tokens=12) for i in range(8)]
    deployment.run()
    assert [each.output for each in asked] == [expected(each) for each in asked]
    assert not deployment.transport.under_way


def test_what_decodes_moves_between_a_shared_pool_and_another_in_both_directions():
    config = replace(CONFIG, handoff=HandoffConfig(rebalance=True))
    deployment = mixed(config)
    asked = [deployment.submit(name, prompt_len=5, max_tokens=30) for name in "abcd"]
    deployment.run_until(lambda: all(each.state is State.DECODING for each in asked))
    leaving = [each for each in asked if each.pool == "hbm/decode-1"]
    assert len(leaving) == 2
    for each in leaving:
        deployment.coordinator.abort(each.request.id)
    deployment.run()
    routes = {(job.source, job.target) for job in deployment.transport.jobs}
    assert ("hbm/prefill-0", "hbm/decode-1") in routes
    stayed = [each for each in asked if each not in leaving]
    assert [each.output for each in stayed] == [expected(each) for each in stayed]


def test_two_decode_engines_share_a_pool_beside_a_prefill_engine_of_its_own():
    chance = Chance(0, max_delay=0)
    prefill = FakePrefillEngine(LAYOUT, 40, chance)
    first = FakeDecodeEngine(LAYOUT, 40, 1, chance, name="decode/0")
    second = FakeDecodeEngine(LAYOUT, 0, 2, chance, name="decode/1", pages=first.pages)
    deployment = assemble([prefill, first, second], chance)
    asked = [deployment.submit(name, prompt_len=5, max_tokens=15) for name in "abc"]
    deployment.run_until(lambda: all(each.state is State.DECODING for each in asked))
    assert {each.pool for each in asked} == {"hbm/decode-0"}
    assert sorted(str(each.engine) for each in asked) == ["decode/0", "decode/1", "decode/1"]
    pages = [page for each in asked for page in each.pages]
    assert len(pages) == len(set(pages))
    deployment.run()
    assert [each.output for each in asked] == [expected(each) for each in asked]


def test_the_pages_of_a_shared_pool_that_run_out_are_taken_from_the_youngest_on_any_engine():
    chance = Chance(0, max_delay=0)
    prefill = FakePrefillEngine(LAYOUT, 40, chance)
    first = FakeDecodeEngine(LAYOUT, 10, 1, chance, name="decode/0")
    second = FakeDecodeEngine(LAYOUT, 0, 1, chance, name="decode/1", pages=first.pages)
    deployment = assemble([prefill, first, second], chance)
    old, young = (deployment.submit(name, prompt_len=12, max_tokens=12) for name in "ab")
    deployment.run()
    assert (old.epoch, young.epoch) == (0, 1)
    assert [old.output, young.output] == [expected(old), expected(young)]


def test_engines_of_one_deployment_differ_in_rows_and_page_size():
    chance = Chance(0, max_delay=0)
    prefill = [
        FakePrefillEngine(replace(LAYOUT, page_size=size), 40, chance, name=f"prefill/{i}")
        for i, size in enumerate((4, 8))
    ]
    decode = [
        FakeDecodeEngine(replace(LAYOUT, page_size=size), 40, rows, chance, name=f"decode/{i}")
        for i, (size, rows) in enumerate(((2, 1), (16, 4)))
    ]
    config = replace(CONFIG, max_waiting=20)
    deployment = assemble([*prefill, *decode], chance, config)
    assert [deployment.state(each).rows.rows for each in decode] == [1, 4]
    sizes = [deployment.state(each).buckets.page_size for each in (*prefill, *decode)]
    assert sizes == [4, 8, 2, 16]
    asked = [deployment.submit(f"{i}", prompt_len=3 + 3 * i, max_tokens=9) for i in range(8)]
    deployment.run()
    assert [each.output for each in asked] == [expected(each) for each in asked]
    routes = {(job.source, job.target) for job in deployment.transport.jobs}
    assert len(routes) == 4


def test_room_ahead_is_only_for_sequences_whose_pool_is_another():
    """While a sequence can decode in its own pool, its KV does not leave ahead."""
    chance, asked = Chance(0, max_delay=0), list[list[str]]()
    planned: list[str] = []

    class Decode(FcfsDecode):
        def admit_ahead(self, streaming, prefilled, engines, now):
            asked.append([view.engine for view in engines])
            plan = super().admit_ahead(streaming, prefilled, engines, now)
            planned.extend(admission.engine for admission in plan)
            return plan

    deployment = assemble(
        list(engines(chance)), chance, policies=make_policies(CONFIG, {"decode": Decode})
    )
    first = [deployment.submit(name, prompt_len=20, max_tokens=20) for name in "ab"]
    deployment.run_until(lambda: all(each.state is State.DECODING for each in first))
    assert asked and not planned and {each.pool for each in first} == {"hbm/prefill-0"}
    deployment.submit("c", prompt_len=20)
    deployment.run()
    assert planned and set(planned) == {"decode/1"}
    assert all(names == ["decode/0", "decode/1"] for names in asked)


# What cannot be.


def refused(message: str, *fakes: FakeEngine, chance: Chance) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        assemble(list(fakes), chance)
    assert "\n" not in str(refusal.value)


def test_two_engines_of_one_name():
    chance = Chance(0)
    prefill, beside, own = engines(chance)
    own.id = beside.id
    refused("two are called decode/0; names must differ", prefill, beside, own, chance=chance)


@pytest.mark.parametrize(("layout", "pages"), [(replace(LAYOUT, page_size=8), 40), (LAYOUT, 39)])
def test_engines_that_share_a_pool_but_do_not_agree_on_it(layout: KVLayout, pages: int):
    chance = Chance(0)
    prefill, beside, _ = engines(chance)
    beside.layout, beside.num_pages = layout, pages
    message = "decode/0: .* pool hbm/prefill-0.*engines that share a pool must agree$"
    refused(message, prefill, beside, chance=chance)


def test_no_engine_of_a_kind():
    chance = Chance(0)
    prefill, beside, own = engines(chance)
    refused("engines: none accepts prefill steps; one must", beside, own, chance=chance)
    refused("engines: none accepts decode steps; one must", prefill, chance=chance)
