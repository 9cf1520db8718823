"""Pools with elements that encode their own place, for tests of code that moves pages."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.quantised import LIMITS, QuantisedPages, decode, encode
from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVLayout, Planes, k_and_v
from pdjax.device.kv.pool import PoolOwner, page_specs
from pdjax.device.kv.transport import ArrivalTicket, DeviceTransport
from pdjax.device.mesh import DECODE_RULES, PREFILL_RULES, make_mesh, take_devices
from pdjax.interfaces.transport import TransferJob

PAGES, PAGE_SIZE, HEAD_DIM = 12, 2, 4
LAYERS, HEADS = 7, 12
"""7 layers divide evenly only into 1 or 7 stages; every tp in the tests divides 12 heads."""

SOURCE, TARGET = PoolId("hbm/source"), PoolId("hbm/target")
"""The names of the two pools, of any layout."""

_ids = count()

Values = tuple[np.ndarray, ...]
"""Of each plane, such as K and V, [L, K, P, S, H]."""


def layout(
    stages: int = 1,
    tp: int = 1,
    *,
    layers: int = LAYERS,
    heads: int = HEADS,
    page_size: int = PAGE_SIZE,
    dtype: str = "float32",
    planes: Planes | None = None,
) -> KVLayout:
    itemsize = {"float32": 4, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}[dtype]
    each = planes or k_and_v(heads, HEAD_DIM)
    return KVLayout((each,) * layers, page_size, dtype, itemsize, stages, tp)


def pools(source: KVLayout, target: KVLayout, pages: int = PAGES) -> tuple[PoolOwner, PoolOwner]:
    """Make two pools on different devices; the target has 3 pages more."""
    sizes = [each.stages * each.tp for each in (source, target)]
    devices = take_devices(sizes, ["source", "target"])
    owners = [
        PoolOwner(
            each,
            count,
            make_mesh(given, each.stages, each.tp),
            PREFILL_RULES if each.stages == 1 else DECODE_RULES,
        )
        for each, count, given in zip((source, target), (pages, pages + 3), devices, strict=True)
    ]
    return owners[0], owners[1]


def coded(pool: PoolOwner, sign: int = 1) -> Values:
    """Make a number for each place, all different."""
    own, first, values = pool.layout, 1, []
    for plane in own.planes[0]:
        shape = own.num_layers, plane.heads, pool.num_pages, own.page_size, plane.dim
        values.append(sign * (first + np.arange(np.prod(shape), dtype=np.float32)).reshape(shape))
        first += values[-1].size
    return tuple(values)


def fill(pool: PoolOwner, values: Values) -> None:
    """Put KV into a pool of any layout; missing layers of short stages stay zeros."""
    [specs] = page_specs(pool.layout.slot_planes[:1], pool.rules)

    def slot_pages(side: np.ndarray, spec: PartitionSpec, slot: int) -> Any:
        stages = [
            layers[slot] if slot < len(layers) else None for layers in pool.layout.stage_layers
        ]
        parts = [np.zeros_like(side[0]) if layer is None else side[layer] for layer in stages]
        whole, dtype = np.concatenate(parts), pool.layout.dtype
        pages: Any = whole.astype(dtype)
        if pool.layout.quantised:
            pages = QuantisedPages(*encode(jnp.asarray(whole), dtype))
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(pool.mesh, spec)), pages)

    pool.arrays = [
        tuple(slot_pages(side, spec, slot) for side, spec in zip(values, specs, strict=True))
        for slot in range(pool.layout.slots)
    ]


def read(pool: PoolOwner) -> Values:
    """Read the KV of a pool, float32: the inverse of `fill`."""
    sides = []
    for plane, arrays in zip(pool.layout.planes[0], zip(*pool.arrays, strict=True), strict=True):
        heads, layers = plane.heads, {}
        for stage, own in enumerate(pool.layout.stage_layers):
            for slot, layer in enumerate(own):
                rows = _numbers(arrays[slot])[stage * heads : (stage + 1) * heads]
                layers[layer] = rows.astype(np.float32)
        sides.append(np.stack([layers[i] for i in range(pool.layout.num_layers)]))
    return tuple(sides)


def _numbers(pages: Any) -> np.ndarray:
    return np.asarray(decode(*pages) if isinstance(pages, QuantisedPages) else pages)


def held(values: Values, *dtypes: str) -> Values:
    """Round K and V, float32, as pools of these types do one after another. Between equal types
    nothing is rounded again."""
    for i, dtype in enumerate(dtypes):
        if dtype in LIMITS and dtype not in dtypes[:i]:
            values = tuple(np.asarray(decode(*encode(jnp.asarray(x), dtype))) for x in values)
        elif dtype not in LIMITS:
            values = tuple(x.astype(dtype).astype(np.float32) for x in values)
    return values


def tokens_of(side: np.ndarray, pages: list[int] | np.ndarray) -> np.ndarray:
    """Take the tokens of some pages, in order: [L, K, P, S, H] -> [L, K, T, H]."""
    taken = side[:, :, pages]
    return taken.reshape(*taken.shape[:2], -1, taken.shape[-1])


def job(
    pages: list[int],
    layers: range = range(LAYERS),
    *,
    checked: bool = False,
    back: bool = False,
) -> TransferJob:
    """From SOURCE to TARGET, or back, with an id of its own."""
    real = sum(page != 0 for page in pages)
    source, target = (TARGET, SOURCE) if back else (SOURCE, TARGET)
    return TransferJob(next(_ids), source, target, layers, ids(pages), real, checked)


def ids(pages: list[int]) -> np.ndarray:
    return np.array(pages, np.int32)


def transport_of(
    source: PoolOwner, target: PoolOwner, wire_dtype: str | None = None
) -> DeviceTransport:
    return DeviceTransport({SOURCE: source, TARGET: target}, wire_dtype)


def move(
    transport: DeviceTransport,
    source_pages: list[int],
    target_pages: list[int],
    layers: range = range(LAYERS),
    *,
    checked: bool = False,
) -> int:
    """Compile, send, wait and write; returns how many pages differ."""
    wanted = job(source_pages, layers, checked=checked)
    with compiled_ahead(transport, wanted, target_pages):
        transport.send(wanted).result()
        return transport.write(wanted.id, ids(target_pages)).result()


@contextmanager
def compiled_ahead(
    transport: DeviceTransport, wanted: TransferJob, target_pages: list[int]
) -> Iterator[None]:
    """A block that sends and writes a job, and that compiles nothing."""
    transport.compile(wanted, ids(target_pages)).result()
    plan: Any = transport.path(wanted.source, wanted.target).plan(wanted.layers)
    forms = [set(program.forms) for program in (plan.gather, plan.scatter)]
    yield
    assert [set(program.forms) for program in (plan.gather, plan.scatter)] == forms


def write_again(transport: Any, sent: ArrivalTicket, target_pages: list[int]) -> int:
    """Write what has arrived, also if that has been written before; returns how many pages
    differ."""
    transport._in_flight[sent.job.id] = sent
    return transport.write(sent.job.id, ids(target_pages)).result()
