"""A transport moves the right bytes, only those, between any two layouts, and no call waits for
them."""

from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.handoff.trace import GATHER
from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVPlane, k_and_v, split_groups
from pdjax.device.compat import all_ready
from pdjax.device.kv.pool import KVPool, PoolOwner
from pdjax.device.kv.transfer_route import Route
from pdjax.device.kv.transport import DeviceTransport, WriteTicket
from tests.helpers.coded_pools import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    PAGES,
    SOURCE,
    TARGET,
    coded,
    compiled_ahead,
    fill,
    held,
    ids,
    job,
    layout,
    move,
    pools,
    read,
    tokens_of,
    transport_of,
)

LAYOUTS = [
    # (stages, tp) of the source, of the target. A prefill engine has one stage.
    *[((1, 1), to) for to in ((3, 1), (1, 4))],
    ((1, 2), (3, 2)),
    ((1, 3), (1, 2)),
    ((1, 4), (6, 2)),
    # Back again.
    ((2, 2), (1, 3)),
    ((7, 1), (1, 2)),
    # From one pipeline to another.
    ((3, 1), (4, 1)),
    ((2, 3), (4, 2)),
]
"""Equal layouts, and stages that one side has several times of, are among the tests below."""


def coded_pools(
    source_cut, target_cut, dtype: str = "float32"
) -> tuple[DeviceTransport, PoolOwner, PoolOwner]:
    source, target = pools(layout(*source_cut, dtype=dtype), layout(*target_cut, dtype=dtype))
    fill(source, coded(source))
    fill(target, coded(target, -1))
    return transport_of(source, target), source, target


def check(target: PoolOwner, source: PoolOwner, moved: dict[tuple[int, int], range]) -> None:
    """Page by page: {(source page, target page): layers} have moved and nothing else has."""
    expected = [side.copy() for side in held(coded(target, -1), target.layout.dtype)]
    for (source_page, target_page), layers in moved.items():
        sent = held(coded(source), source.layout.dtype)
        for new, old in zip(expected, sent, strict=True):
            rows = slice(layers.start, layers.stop)
            new[rows, :, target_page] = old[rows, :, source_page]
    for got, wanted in zip(read(target), expected, strict=True):
        np.testing.assert_array_equal(got[:, :, 1:], wanted[:, :, 1:])


@pytest.mark.parametrize(
    ("source_cut", "target_cut", "checked"),
    [(*cuts, index % 2 == 0) for index, cuts in enumerate(LAYOUTS)],
)
def test_moves_exactly_the_pages_named(source_cut, target_cut, checked):
    """Of every two pairs of layouts, one is checked: checksums know pieces, not layouts."""
    transport, source, target = coded_pools(source_cut, target_cut)
    wanted, pages = job([5, 2, 11, 0], checked=checked), [7, 14, 1, 0]
    with (
        compiled_ahead(transport, wanted, pages),
        jax.transfer_guard_device_to_host("disallow"),  # a layout-changing put would go that way
    ):
        ticket = transport.send(wanted)
        cost = ticket.result()
        written = transport.write(wanted.id, ids(pages))
        assert written.result() == 0
    assert ticket.ready() and ticket.read.ready() and written.ready()

    check(target, source, dict.fromkeys([(5, 7), (2, 14), (11, 1)], range(LAYERS)))
    # Three pages and a padding page; no layer travels twice. A checksum is a word a page and piece.
    checks = 4 * 4 * cost.pieces if checked else 0
    assert cost.bytes == 4 * source.layout.page_bytes + checks
    assert (cost.pages, cost.puts, cost.layout_changing_puts) == (3, 1, 0)


@pytest.mark.parametrize(
    ("source_cut", "target_cut", "dtype"),
    [((1, 2), (3, 1), "int8"), ((3, 1), (2, 2), "float32")],
)
def test_a_sequence_arrives_in_parts(source_cut, target_cut, dtype):
    """By layer groups and by pages, in any order, with other groups written in between."""
    transport, source, target = coded_pools(source_cut, target_cut, dtype)
    groups = split_groups(LAYERS, 3)
    sent = [
        (([4, 9], [1, 2]), groups[0]),
        (([4, 9], [1, 2]), groups[2]),
        (([3, 0], [3, 0]), range(LAYERS)),
        (([4, 9], [1, 2]), groups[1]),
        (([6, 0], [5, 0]), range(groups[0].start, groups[1].stop)),
    ]
    tickets = [transport.send(job(pages, layers)) for (pages, _), layers in sent]
    for i in (1, 0, 4, 3, 2):
        (_, pages), _ = sent[i]
        assert transport.write(tickets[i].job.id, ids(pages)).result() == 0
    check(
        target,
        source,
        {
            (4, 1): range(LAYERS),
            (9, 2): range(LAYERS),
            (3, 3): range(LAYERS),
            (6, 5): sent[4][1],
        },
    )
    assert sum(ticket.cost.puts for ticket in tickets) == len(sent)


def test_what_is_not_wanted_is_written_to_the_null_page():
    transport, source, target = coded_pools((1, 1), (3, 1))
    move(transport, [1, 2, 3, 0], [0, 4, 0, 0])
    check(target, source, {(2, 4): range(LAYERS)})


@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn"])
def test_pages_come_home(dtype):
    """There and back again: what returns is what left."""
    transport, source, _ = coded_pools((1, 2), (3, 1), dtype)
    move(transport, [1, 2], [8, 9])
    before = read(source)
    back = transport.send(job([9, 8], back=True))
    transport.write(back.job.id, ids([3, 4])).result()
    for got, old in zip(read(source), before, strict=True):
        np.testing.assert_array_equal(got[:, :, [3, 4]], old[:, :, [2, 1]])
        others = [1, 2, *range(5, PAGES)]
        np.testing.assert_array_equal(got[:, :, others], old[:, :, others])


def test_equal_groups_share_their_programs():
    source, target = pools(layout(1, 1, layers=8), layout(2, 1, layers=8))
    transport = transport_of(source, target)
    for layers in split_groups(8, 4):
        move(transport, [1, 2], [3, 4], layers)
    path: Any = transport.path(SOURCE, TARGET)
    plans = [path.plan(layers) for layers in split_groups(8, 4)]
    assert {(plan.gather, plan.scatter) for plan in plans} == {(plans[0].gather, plans[0].scatter)}
    assert (len(plans[0].gather.forms), len(plans[0].scatter.forms)) == (1, 1)


@pytest.mark.parametrize("wire_dtype", [None, "int8"])
@pytest.mark.parametrize("checked", [False, True])
def test_a_job_between_two_devices_is_one_piece(wire_dtype, checked):
    source, target = pools(layout(), layout())
    transport = transport_of(source, target, wire_dtype)
    cost = transport.send(job([1, 2], checked=checked)).result()
    assert (cost.pieces, cost.puts) == (1, 1)


@pytest.mark.smoke
def test_dispatch_returns_before_the_source_is_ready():
    source, target = pools(layout(1, 2, layers=4, heads=4), layout(2, 1, layers=4, heads=4))
    transport = transport_of(source, target)
    layers = range(4)
    move(transport, [1, 0], [2, 0], layers)  # compiled

    @jax.jit
    def slow(pool: KVPool, turns: int) -> KVPool:
        def burn(_, m):
            return jnp.tanh(m @ m)

        one = 1 + 0 * jax.lax.fori_loop(0, turns, burn, jnp.ones((700, 700)))[0, 0]
        return jax.tree.map(lambda pages: pages + one, pool)

    slow(source.arrays, 0)  # compiled; its result is dropped
    source.arrays = slow(source.arrays, 80)
    ticket = transport.send(job([1, 0], layers))
    still_running = not all_ready(source.arrays)
    assert still_running and not ticket.read.ready() and not ticket.ready()
    written = transport.write(ticket.job.id, ids([2, 0]))  # after its arrival; no call waits
    assert not all_ready(source.arrays) and not written.ready()
    assert written.result() == 0
    ticket.result()  # has come before that, but may be said to be ready a moment after it
    assert ticket.read.ready() and ticket.ready()
    assert np.asarray(target.arrays[0][0])[:, 2].min() == 1.0


class Written:
    """What a scatter that failed leaves."""

    def is_ready(self) -> bool:
        return True

    def block_until_ready(self) -> None:
        raise RuntimeError("out of memory")


def test_what_is_not_checked_is_not_copied_to_the_host_and_fails_all_the_same():
    array: Any = Written()
    looked: list[str] = []
    pool: Any = SimpleNamespace(inspect=lambda: looked.append("at the pool"))
    written = WriteTicket(array, checked=False, target=pool)
    assert written.ready()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            written.result()
    assert looked == ["at the pool"] * 2
    with pytest.raises(AttributeError, match="copy_to_host_async"):
        WriteTicket(array, checked=True, target=pool)


def test_the_profiler_is_asked_for_the_gather_by_its_name():
    source, target = pools(layout(), layout())
    gather: Any = transport_of(source, target).path(SOURCE, TARGET).plan(range(LAYERS)).gather
    assert f"jit_{gather.jitted.__name__}" == GATHER


def test_pools_connect_with_all_others():
    source, target = pools(layout(), layout())
    transport = transport_of(source, target)
    assert transport.connects(SOURCE, TARGET) and transport.connects(TARGET, SOURCE)
    elsewhere = PoolId("disk/0")
    for ends in ((SOURCE, SOURCE), (SOURCE, elsewhere), (elsewhere, TARGET)):
        assert not transport.connects(*ends)
    with pytest.raises(ValueError, match="source=disk/0, target=hbm/target: must be two pools of"):
        transport.send(replace(job([1]), source=elsewhere))
    with pytest.raises(ValueError, match="target=disk/0: must be"):
        transport.measure(SOURCE, elsewhere, 1000)


def test_the_link_is_measured():
    source, target = pools(layout(), layout())
    transport = transport_of(source, target)
    measured = transport.measure(SOURCE, TARGET, 1000)
    assert 0 < measured.result() < 10 and measured.ready()
    transport.close()


def test_a_job_is_known_until_it_is_written_or_cancelled():
    source, target = pools(layout(), layout())
    transport = transport_of(source, target)
    written, cancelled, closed = (transport.send(job([1])) for _ in range(3))
    with pytest.raises(ValueError, match=f"job.id={written.job.id}: a job with this id"):
        transport.send(written.job)
    transport.write(written.job.id, ids([2])).result()
    transport.cancel(cancelled.job.id)
    transport.cancel(cancelled.job.id)  # not known, and no error
    transport.close()
    for each in (written, cancelled, closed):
        with pytest.raises(ValueError, match=f"job_id={each.job.id}: must be a job in flight"):
            transport.write(each.job.id, ids([2]))
    assert transport.send(written.job).result().pages == 1


@pytest.mark.parametrize(("field", "ours", "theirs"), [("layers", 7, 6), ("heads", 12, 6)])
def test_pools_of_different_models_are_refused(field, ours, theirs):
    source, target = pools(layout(), layout(**{field: theirs}))
    message = f"num_layers: the sending pool has {ours}, the receiving pool {theirs}; they must"
    if field == "heads":
        message = "planes of layer 0: the sending pool has k of 12 x 4, v of 12 x 4, the receiving"
    with pytest.raises(ValueError, match=message):
        transport_of(source, target)
    with pytest.raises(ValueError, match="wire_dtype='int4': allowed are None and int8, float8"):
        transport_of(*pools(layout(), layout()), "int4")
    with pytest.raises(ValueError, match="page_size: the sending pool has 4, the receiving pool 6"):
        transport_of(*pools(layout(page_size=4), layout(page_size=6)))


@pytest.mark.parametrize(
    ("stages", "tp", "message"),
    [
        (1, 2, "tp=2: does not divide the model's 3 KV heads; allowed: \\[1, 3\\]"),
        (8, 1, "stages=8: must be between"),
    ],
)
def test_a_layout_that_cannot_work_says_why(stages, tp, message):
    with pytest.raises(ValueError, match=message):
        layout(stages, tp, layers=6, heads=3)


def test_a_route_takes_every_layer_once_and_its_parts_do_not_overlap():
    sizes = range(1, LAYERS + 1)
    for source, target in product([layout(stages) for stages in sizes], repeat=2):
        for first, stop in product(range(LAYERS), sizes):
            if first >= stop:
                continue
            route = Route.of(source, target, range(first, stop))
            assert [i for run in route.runs for i in run.layers] == list(range(first, stop))
            for run in route.runs:
                for at, stage, slots in (
                    (source, run.source_stage, run.source_slots),
                    (target, run.target_stage, run.target_slots),
                ):
                    held = at.stage_layers[stage]
                    assert held[slots.start : slots.stop] == tuple(run.layers)
            for parts in (route.source_parts, route.target_parts):
                ordered = sorted(parts, key=lambda part: part.start)
                assert all(a.stop <= b.start for a, b in pairwise(ordered))


def test_a_route_serves_several_stages_with_one_part():
    bulk = Route.of(layout(1), layout(3), range(LAYERS))  # 3 + 2 + 2 layers
    assert bulk.target_parts == (range(2), range(2, 3))
    assert bulk.source_parts == (range(2), range(2, 3), range(3, 5), range(5, 7))
    whole = Route.of(layout(1), layout(1), range(LAYERS))
    assert whole.target_parts == whole.source_parts == (range(LAYERS),)


LATENT = KVPlane("latent", 1, 6, sharded=False)
"""What every shard of a mesh has the whole of, as of attention with a latent (MLA)."""

BESIDE = (*k_and_v(HEADS, HEAD_DIM), LATENT)
"""Planes of two shapes in every layer."""


@pytest.mark.parametrize(
    ("source_cut", "target_cut", "dtype", "page_size", "planes", "checked"),
    [
        ((1, 1), (1, 1), "float32", 2, (LATENT,), False),
        ((1, 2), (3, 1), "int8", 2, BESIDE, True),
        ((1, 3), (2, 2), "float32", 4, BESIDE, True),
    ],
)
def test_planes_of_any_kind_travel(source_cut, target_cut, dtype, page_size, planes, checked):
    source, target = pools(
        layout(*source_cut, dtype=dtype, planes=planes),
        layout(*target_cut, dtype=dtype, planes=planes, page_size=page_size),
    )
    fill(source, coded(source))
    fill(target, coded(target, -1))
    transport = transport_of(source, target)
    sent, written = ([5, 2], [7, 9]) if page_size == 2 else ([5, 2], [7])
    ticket = transport.send(job(sent, checked=checked))
    assert transport.write(ticket.job.id, ids(written)).result() == 0
    wire = transport.path(SOURCE, TARGET).wire
    whole = wire.token_bytes(source.layout) * 4
    # A plane that is not sharded goes to each shard of the target.
    again = 4 * LAYERS * wire.head_bytes(LATENT.dim)
    checks = 4 * (2 if page_size == 2 else 1) * ticket.cost.pieces if checked else 0
    assert ticket.cost.bytes == whole + again * (target_cut[1] - 1) + checks
    before = held(coded(target, -1), dtype)
    for got, old, values in zip(read(target), before, held(coded(source), dtype), strict=True):
        np.testing.assert_array_equal(tokens_of(got, written), tokens_of(values, sent))
        others = [i for i in range(1, target.num_pages) if i not in written]
        np.testing.assert_array_equal(got[:, :, others], old[:, :, others])
    for pages in jax.tree.leaves([planes[-1] for planes in target.arrays]):
        by_stage: dict[Any, list[np.ndarray]] = {}
        for shard in pages.addressable_shards:
            by_stage.setdefault(shard.index[0].start, []).append(np.asarray(shard.data)[:, 1:])
        for stage in by_stage.values():  # every shard of a stage has the same
            assert all(np.array_equal(stage[0], other) for other in stage)
