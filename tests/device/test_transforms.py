"""What changes on the way: the size of a page, the type of its elements; and what must not."""

from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantised import LIMITS, decode, encode
from pdjax.device.kv.checksums import checksums
from pdjax.device.kv.wire import Wire
from tests.helpers.coded_pools import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    SOURCE,
    TARGET,
    Values,
    coded,
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
    write_again,
)


@pytest.mark.parametrize(
    ("source_cut", "target_cut", "ours", "theirs", "checked"),
    [
        ((1, 1), (1, 1), 2, 4, True),
        ((1, 1), (1, 1), 4, 2, False),
        ((1, 1), (1, 1), 3, 6, True),
        ((1, 2), (3, 1), 2, 6, False),
        ((1, 2), (3, 1), 4, 1, True),
        ((2, 1), (1, 3), 4, 2, True),
    ],
)
def test_pages_of_another_size(source_cut, target_cut, ours, theirs, checked):
    """Two spans of tokens, scattered over the pools; then some of the second is null."""
    source, target = pools(
        layout(*source_cut, page_size=ours), layout(*target_cut, page_size=theirs)
    )
    fill(source, coded(source))
    fill(target, coded(target, -1))
    span = lcm(ours, theirs)
    source_pages = [5, 3, 9, 8, 1, 6, 2, 7][: 2 * span // ours]
    target_pages = [4, 11, 2, 9, 14, 1, 7, 3][: 2 * span // theirs]
    transport = transport_of(source, target)
    assert move(transport, source_pages, target_pages, checked=checked) == 0
    for got, sent, old in zip(read(target), coded(source), coded(target, -1), strict=True):
        np.testing.assert_array_equal(tokens_of(got, target_pages), tokens_of(sent, source_pages))
        others = [page for page in range(1, target.num_pages) if page not in target_pages]
        np.testing.assert_array_equal(got[:, :, others], old[:, :, others])


@pytest.mark.parametrize("wire_dtype", [None, "int8"])
def test_a_span_may_end_in_null_pages(wire_dtype):
    """Three small pages make one large one and a half."""
    source, target = pools(layout(page_size=2), layout(page_size=4))
    fill(source, coded(source))
    fill(target, coded(target, -1))
    move(transport_of(source, target, wire_dtype), [5, 2, 7, 0], [3, 6], checked=True)
    for got, sent in zip(read(target), coded(source), strict=True):
        came, left = tokens_of(got, [3, 6])[:, :, :6], tokens_of(sent, [5, 2, 7])
        np.testing.assert_allclose(came, left, rtol=1 / 128 if wire_dtype else 0)


@pytest.mark.parametrize(
    ("ours", "theirs", "bytes_each", "checked"),
    [
        ("float32", "bfloat16", 2, True),
        ("bfloat16", "float32", 2, False),
        ("bfloat16", "bfloat16", 2, True),
    ],
)
def test_types_are_cast_where_fewer_bytes_travel(ours, theirs, bytes_each, checked):
    source, target = pools(layout(1, 2, dtype=ours), layout(3, 1, dtype=theirs))
    fill(source, coded(source))
    transport = transport_of(source, target)
    ticket = transport.send(job([2, 5], checked=checked))
    cost = ticket.result()
    assert transport.write(ticket.job.id, ids([9, 4])).result() == 0
    for got, sent in zip(read(target), read(source), strict=True):
        rounded = np.asarray(sent, jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(got[:, :, [9, 4]], rounded[:, :, [2, 5]])
    elements = 2 * LAYERS * HEADS * 2 * 2 * HEAD_DIM
    assert cost.bytes == elements * bytes_each + (4 * 2 * cost.pieces if checked else 0)


QUANTISED = [
    ("float32", "int8"),
    ("bfloat16", "int8"),
    ("bfloat16", "float8_e4m3fn"),
    ("int8", "int8"),
    ("float8_e4m3fn", "float8_e4m3fn"),
    ("int8", "float8_e4m3fn"),
    ("int8", "float32"),
    ("float8_e4m3fn", "bfloat16"),
]


CUTS = [
    ((1, 1), (1, 1), 2, 2, False),
    ((1, 2), (3, 1), 2, 4, True),
    ((2, 2), (3, 2), 4, 2, False),
]
"""Of a source and of its target, with the sizes of their pages, and whether they are checked: they
say where bytes go, and types what becomes of them."""


@pytest.mark.parametrize(
    ("source_cut", "target_cut", "size", "their_size", "checked", "ours", "theirs"),
    [(*CUTS[i % len(CUTS)], *types) for i, types in enumerate(QUANTISED)],
)
def test_quantised_pools(source_cut, target_cut, size, their_size, ours, theirs, checked):
    """What comes is what the two pools' types make of it, rounded once and to the bit; scales
    travel beside their elements, and nothing else changes."""
    source, target = pools(
        layout(*source_cut, page_size=size, dtype=ours),
        layout(*target_cut, page_size=their_size, dtype=theirs),
    )
    fill(source, coded(source))
    fill(target, coded(target, -1))
    old = read(target)
    transport = transport_of(source, target)
    pages = [5, 2, 7, 1][: 2 * max(size, their_size) // size]
    their_pages = [3, 8, 4, 1][: 2 * max(size, their_size) // their_size]
    ticket = transport.send(job(pages, checked=checked))
    cost = ticket.result()
    assert transport.write(ticket.job.id, ids(their_pages)).result() == 0
    for got, sent, was in zip(read(target), held(coded(source), ours, theirs), old, strict=True):
        np.testing.assert_array_equal(tokens_of(got, their_pages), tokens_of(sent, pages))
        others = [page for page in range(1, target.num_pages) if page not in their_pages]
        np.testing.assert_array_equal(got[:, :, others], was[:, :, others])
    tokens = len(pages) * size
    spans = tokens // lcm(size, their_size) * cost.pieces if checked else 0
    assert cost.bytes == 2 * LAYERS * HEADS * tokens * (HEAD_DIM + 4) + 4 * spans


def test_the_wire_of_a_quantised_pool_is_its_own():
    cuts = layout(), layout(dtype="int8")
    assert transport_of(*pools(*cuts), "int8").path(SOURCE, TARGET).wire.dtype == "int8"
    with pytest.raises(ValueError, match="wire_dtype='float8_e4m3fn': must be None or 'int8'"):
        transport_of(*pools(*cuts), "float8_e4m3fn")


def rows(pool, draw) -> Values:
    """Drawn K and V of a pool, to be filled in."""
    shape = coded(pool)[0].shape
    return draw(shape), draw(shape)


@pytest.mark.parametrize(
    ("source_cut", "target_cut", "ours", "theirs", "dtype", "wire_dtype", "checked"),
    [
        ((1, 2), (3, 1), 2, 2, "float32", "int8", False),
        ((1, 2), (3, 1), 2, 2, "float32", "float8_e4m3fn", True),
        ((3, 1), (1, 1), 4, 2, "bfloat16", "int8", True),
        ((3, 1), (1, 1), 4, 2, "bfloat16", "float8_e4m3fn", False),
    ],
)
def test_rounded_kv_arrives_within_its_error(
    source_cut, target_cut, ours, theirs, dtype, wire_dtype, checked
):
    source, target = pools(
        layout(*source_cut, page_size=ours, dtype=dtype),
        layout(*target_cut, page_size=theirs, dtype=dtype),
    )
    rng = np.random.default_rng(3)
    sent = rows(source, lambda shape: np.asarray(rng.normal(size=shape), np.float32))
    fill(source, sent)
    transport = transport_of(source, target, wire_dtype)
    ticket = transport.send(job([2, 5], checked=checked))
    cost = ticket.result()
    target_pages = [3, 8, 4, 1][: 2 * ours // theirs]
    assert transport.write(ticket.job.id, ids(target_pages)).result() == 0
    for got, left in zip(read(target), read(source), strict=True):
        x, y = tokens_of(left, [2, 5]), tokens_of(got, target_pages)
        scale = np.abs(x).max(axis=-1, keepdims=True) / LIMITS[wire_dtype]
        bound = {
            "int8": scale / 2,
            "float8_e4m3fn": np.maximum(np.abs(x) / 16, scale / 1024),
        }[wire_dtype]
        rounding = np.abs(y) * 2.0**-8 if dtype == "bfloat16" else 0  # that of the target
        assert (np.abs(x - y) <= bound * (1 + 1e-5) + rounding).all()
    heads = 2 * LAYERS * HEADS * 2 * ours  # of all tokens, K and V
    spans = 2 * cost.pieces if checked else 0
    assert cost.bytes == heads * (HEAD_DIM + 4) + 4 * spans


@pytest.mark.parametrize(
    ("wire_dtype", "elements"),
    [
        ("int8", np.arange(-127, 128)),
        ("float8_e4m3fn", np.array([0, 2**-9, 1.75, -2, 15, 240, 448])),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_what_the_wire_can_say_is_said_exactly(wire_dtype, elements, scale):
    limit = LIMITS[wire_dtype]
    x = np.stack([elements, np.full(len(elements), limit)], axis=1).astype(np.float32) * scale
    coded_x, scales = jax.jit(encode, static_argnums=1)(x, wire_dtype)
    assert coded_x.dtype == wire_dtype
    np.testing.assert_array_equal(scales, np.full(len(x), scale, np.float32))
    np.testing.assert_array_equal(jax.jit(decode)(coded_x, scales), x)


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("between", [("bfloat16", "bfloat16"), ("float32", "bfloat16")])
def test_a_narrower_type_makes_nothing_infinite(between, checked):
    """V in pages is finite, also in a pool whose type has smaller numbers; NaN in K stays."""
    wire, largest = Wire(*between), float(jnp.finfo("bfloat16").max)
    sent = jnp.array([3.4e38, -3.4e38, 1.5, np.nan], jnp.float32)
    piece = wire.write(sent.reshape(1, 1, 1, 4), 1, checked=checked)
    got, intact = wire.read(piece, (1, 1, 4), 1, checked=checked)
    assert isinstance(got, jax.Array) and got.dtype == jnp.bfloat16
    assert intact is None or bool(intact.all())
    np.testing.assert_array_equal(
        np.asarray(got, np.float32)[0, 0], [largest, -largest, 1.5, np.nan]
    )


@pytest.mark.parametrize("wire_dtype", list(LIMITS))
def test_rows_that_have_no_scale(wire_dtype):
    x = np.array(
        [[0, 0], [-0.0, 0], [1e-40, 0], [np.nan, 1], [np.inf, 1], [3, -np.inf], [3e38, 1]],
        np.float32,
    )
    got = np.asarray(decode(*jax.jit(encode, static_argnums=1)(x, wire_dtype)))
    assert (got[:3] == 0).all()
    assert np.isnan(got[3:6]).all()  # seen, not hidden
    np.testing.assert_allclose(got[6], [3e38, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("shape", [(2, 3, 1, 2), (1, 3, 1, 3)])
def test_words_hold_any_number_of_elements(dtype, shape):
    wire = Wire(dtype, "float32")
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    tokens = (shape[0], shape[1] * shape[2], shape[3])
    piece = jax.jit(lambda x: wire.write(x, 3, checked=True))(x)
    got, intact = wire.read(piece, tokens, 3, checked=True)
    assert (piece.dtype, piece.ndim) == (jnp.uint32, 1)
    assert intact is not None and intact.all()
    np.testing.assert_allclose(got, x.reshape(tokens), rtol=1 / 16)


# Checksums.


@pytest.mark.parametrize(
    ("source_cut", "target_cut", "wire_dtype", "dtype"),
    [
        ((1, 1), (1, 3), None, "float32"),
        ((1, 2), (3, 1), "int8", "float32"),
        ((2, 2), (4, 1), None, "int8"),
    ],
)
def test_a_flipped_bit_is_caught(source_cut, target_cut, wire_dtype, dtype):
    """On the device where it happened, in whatever word of a piece, and nowhere else."""
    source, target = pools(layout(*source_cut), layout(*target_cut, dtype=dtype))
    fill(source, coded(source))
    transport = transport_of(source, target, wire_dtype)
    ticket = transport.send(job([3, 1, 2, 0], checked=True))
    units = ticket.pieces[0]
    clean = units[-1]
    words = len(clean.addressable_shards[0].data)
    per_page = words // 4  # elements of page 0 come first in each row; checksums are the last four
    for word in (0, per_page, words - 5, words - 4):
        for bit in (0, 31):
            units[-1] = flipped(clean, device=0, word=word, bit=bit)
            differ = write_again(transport, ticket, [5, 6, 7, 0])
            wanted = 0 if word == words - 5 else 1  # the last elements are of the null page
            assert differ == wanted, (word, bit)
    units[-1] = clean
    assert write_again(transport, ticket, [5, 6, 7, 0]) == 0


def flipped(pieces: jax.Array, device: int, word: int, bit: int) -> jax.Array:
    """The same with another bit in one device's piece."""
    shards = [shard.data for shard in pieces.addressable_shards]
    corrupt = np.array(shards[device])
    corrupt[word] ^= np.uint32(1 << bit)
    shards[device] = jax.device_put(corrupt, pieces.addressable_shards[device].device)
    return jax.make_array_from_single_device_arrays(pieces.shape, pieces.sharding, shards)


def test_every_page_of_a_torn_span_counts():
    source, target = pools(layout(1, 2, page_size=4), layout(1, 2, page_size=2))
    transport = transport_of(source, target)
    ticket = transport.send(job([3, 0], checked=True))
    clean = ticket.pieces[0][0]
    ticket.pieces[0][0] = flipped(clean, device=1, word=0, bit=7)
    assert write_again(transport, ticket, [4, 5, 0, 0]) == 2
    assert write_again(transport, ticket, [4, 0, 0, 0]) == 1
    ticket.pieces[0][0] = flipped(ticket.pieces[0][0], device=0, word=0, bit=7)
    assert write_again(transport, ticket, [4, 5, 0, 0]) == 4


def test_checksums_see_order_zeros_and_single_bits():
    x: Any = np.random.default_rng(5).integers(0, 2**32, (3, 8), np.uint32)[..., None]
    swapped = x.copy()
    swapped[0, [0, 1]] = swapped[0, [1, 0]]
    across = x.copy()
    across[[0, 1], 5] = across[[1, 0], 5]
    first = checksums([x], 2)
    assert list(np.asarray(first != checksums([swapped], 2))) == [True, False]
    assert list(np.asarray(first != checksums([across], 2))) == [False, True]
    assert (checksums([np.zeros_like(x)], 2) != 0).all()
    assert (first != checksums([x ^ np.uint32(1 << 31)], 2)).all()  # every sign at once

    sums = {int(checksums([x], 1)[0])}
    for bit in range(32):
        changed = x.copy()
        changed[1, 2] ^= np.uint32(1 << bit)
        sums.add(int(checksums([changed], 1)[0]))
    assert len(sums) == 33
