"""The hand-off moves the right bytes, only those, between any two layouts, and nobody waits for
it."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdjax.device.compat import all_ready
from pdjax.device.kv.pool import KVPool, PoolOwner
from pdjax.device.kv.transfer import DeviceTransfer
from pdjax.device.mesh import DECODE_RULES, PREFILL_RULES, make_mesh, take_devices
from pdjax.kv_layout import KVLayout

PAGES, PAGE_SIZE, HEAD_DIM = 12, 2, 4


def layout(layers: int, heads: int, stages: int, tp: int, page_size: int = PAGE_SIZE) -> KVLayout:
    return KVLayout(layers, heads, HEAD_DIM, page_size, "float32", 4, stages, tp)


def position_coded(layers: int, heads: int, pages: int, side: int) -> np.ndarray:
    """[L, K, P, S, H] where every element's value says where it belongs."""
    shape = (2, layers, heads, pages, PAGE_SIZE, HEAD_DIM)
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)[side]


def fill(pool: PoolOwner, values: tuple[np.ndarray, np.ndarray]) -> None:
    """Put [L, K, P, S, H] for K and for V into a pool, whatever its layout; short stages keep
    zeros."""
    where = pool.arrays.k[0].sharding

    def slot_array(side: np.ndarray, slot: int) -> jax.Array:
        stages = [
            layers[slot] if slot < len(layers) else None for layers in pool.layout.stage_layers
        ]
        parts = [np.zeros_like(side[0]) if layer is None else side[layer] for layer in stages]
        return jax.device_put(np.concatenate(parts), where)

    slots = range(pool.layout.slots)
    pool.arrays = KVPool(
        k=[slot_array(values[0], slot) for slot in slots],
        v=[slot_array(values[1], slot) for slot in slots],
    )


def read(pool: PoolOwner) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `fill`."""
    heads, sides = pool.layout.kv_heads, []
    for arrays in (pool.arrays.k, pool.arrays.v):
        layers = {}
        for stage, held in enumerate(pool.layout.stage_layers):
            for slot, layer in enumerate(held):
                layers[layer] = np.asarray(arrays[slot])[stage * heads : (stage + 1) * heads]
        sides.append(np.stack([layers[i] for i in range(pool.layout.num_layers)]))
    return sides[0], sides[1]


def pools(
    layers: int, heads: int, tp_p: int, stages: int, tp_d: int
) -> tuple[PoolOwner, PoolOwner]:
    devices = take_devices([tp_p, stages * tp_d], ["prefill", "decode"])
    source = PoolOwner(
        layout(layers, heads, 1, tp_p), PAGES, make_mesh(devices[0], 1, tp_p), PREFILL_RULES
    )
    target = PoolOwner(
        layout(layers, heads, stages, tp_d),
        PAGES + 3,
        make_mesh(devices[1], stages, tp_d),
        DECODE_RULES,
    )
    return source, target


LAYOUTS = [
    (tp_p, stages, tp_d)
    for tp_p, stages, tp_d in product((1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (1, 2))
    if (stages in (1, 3, 4, 6) or tp_p == 3) and tp_p + stages * tp_d <= 16
]


@pytest.mark.parametrize(("tp_p", "stages", "tp_d"), LAYOUTS)
def test_moves_exactly_the_pages_named(tp_p, stages, tp_d):
    layers, heads = 7, 12  # 7 layers divide into no number of stages but 1; 12 heads into every tp
    source, target = pools(layers, heads, tp_p, stages, tp_d)
    sent = position_coded(layers, heads, PAGES, 0), position_coded(layers, heads, PAGES, 1)
    before = (
        -1 - position_coded(layers, heads, PAGES + 3, 0),
        -1 - position_coded(layers, heads, PAGES + 3, 1),
    )
    fill(source, sent)
    fill(target, before)

    transfer = DeviceTransfer([source], [target])
    source_pages, target_pages = (
        np.array([5, 2, 11, 0], np.int32),
        np.array([7, 14, 1, 0], np.int32),
    )
    with jax.transfer_guard_device_to_host("disallow"):  # a layout-changing put would go that way
        ticket = transfer.start(0, 0, source_pages, target_pages, 3)
        cost = ticket.result()
        transfer.land(ticket)

    for got, old, new in zip(read(target), before, sent, strict=True):
        np.testing.assert_array_equal(got[:, :, [7, 14, 1]], new[:, :, [5, 2, 11]])
        untouched = [page for page in range(1, PAGES + 3) if page not in (7, 14, 1)]
        np.testing.assert_array_equal(got[:, :, untouched], old[:, :, untouched])
    assert (
        cost.bytes == 4 * source.layout.page_bytes
    )  # three pages and a padding page; no layer travels twice
    assert (cost.pages, cost.puts, cost.layout_changing_puts) == (3, 1, 0)


@pytest.mark.smoke
def test_dispatch_returns_before_the_source_is_ready():
    source, target = pools(4, 4, 2, 2, 1)
    transfer = DeviceTransfer([source], [target])
    ids = np.array([1, 0], np.int32), np.array([2, 0], np.int32)
    warm = transfer.start(0, 0, *ids, 1)
    warm.result()
    transfer.land(warm)

    @jax.jit
    def slow(pool: KVPool) -> KVPool:
        def burn(_, m):
            return jnp.tanh(m @ m)

        one = 1 + 0 * jax.lax.fori_loop(0, 60, burn, jnp.ones((700, 700)))[0, 0]
        return jax.tree.map(lambda pages: pages + one, pool)

    slow(source.arrays)  # compiled; its result is dropped
    source.arrays = slow(source.arrays)
    ticket = transfer.start(0, 0, *ids, 1)
    still_running = not all_ready(source.arrays)
    assert still_running and not ticket.ready()
    ticket.result()
    transfer.land(ticket)
    assert np.asarray(target.arrays.k[0])[:, 2].min() == 1.0


def test_pools_of_different_pages_are_refused():
    devices = take_devices([1, 1], ["prefill", "decode"])
    source = PoolOwner(layout(2, 2, 1, 1), 4, make_mesh(devices[0], 1, 1), PREFILL_RULES)
    target = PoolOwner(
        layout(2, 2, 1, 1, page_size=8), 4, make_mesh(devices[1], 1, 1), DECODE_RULES
    )
    with pytest.raises(ValueError, match="page_size: the sending pool has 2, the receiving pool 8"):
        DeviceTransfer([source], [target])


@pytest.mark.parametrize(
    ("stages", "tp", "message"),
    [
        (1, 2, "tp=2: does not divide the model's 3 KV heads; allowed: \\[1, 3\\]"),
        (8, 1, "stages=8: must be between"),
    ],
)
def test_a_layout_that_cannot_work_says_why(stages, tp, message):
    with pytest.raises(ValueError, match=message):
        layout(6, 3, stages, tp)
