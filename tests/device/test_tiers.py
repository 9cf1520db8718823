"""Pages that go from pools on devices to a tier in host memory, and come up again."""

from itertools import count

import numpy as np
import pytest

from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVPlane
from pdjax.device.kv.host_pool import HostPool
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.tiers import HostTransport
from pdjax.device.kv.transports import Transports
from pdjax.interfaces.transport import Pool, TransferJob
from tests.helpers.coded_pools import (
    LAYERS,
    SOURCE,
    TARGET,
    coded,
    fill,
    ids,
    layout,
    pools,
    read,
    tokens_of,
)

HOST = PoolId("host/0")
_numbers = count()


def below(source: PoolOwner, target: PoolOwner, **form: object) -> Transports:
    planes = source.layout.planes[0]
    own = layout(planes=planes, dtype=source.layout.dtype, **form)  # type: ignore[arg-type]
    host = HostPool(Pool(HOST, own, 9))
    return Transports([HostTransport({SOURCE: source, TARGET: target}, host)])


def move(
    transports: Transports, here: PoolId, pages: list[int], there: PoolId, to: list[int]
) -> None:
    layers = range(LAYERS)
    job = TransferJob(next(_numbers), here, there, layers, ids(pages), int(np.count_nonzero(pages)))
    sent = transports.send(job)
    assert sent.result().pages == job.pages
    sent.read.result()
    assert transports.write(job.id, ids(to)).result() == 0


@pytest.mark.parametrize(
    ("source", "target", "page_size"),
    [
        (layout(tp=2), layout(stages=2, page_size=4), 4),
        (layout(planes=(KVPlane("latent", 1, 6, False),), dtype="bfloat16"), None, 2),
    ],
    ids=["two shards, two stages, larger pages", "a plane that is whole on every shard"],
)
def test_pages_go_down_and_come_up(source, target, page_size):
    here, there = pools(source, target or source)
    values = coded(here)
    if source.dtype == "bfloat16":
        values = tuple(each % 251 for each in values)
    fill(here, values)
    transports, each = below(here, there, page_size=page_size), page_size // 2
    low = [2, 8] if each == 2 else [2, 8, 1, 4]
    up = [6, 4] if each == 2 else [6, 4, 3, 9]
    move(transports, SOURCE, [3, 1, 7, 5], HOST, low)
    move(transports, HOST, low, TARGET, up)
    for before, after in zip(values, read(there), strict=True):
        np.testing.assert_array_equal(tokens_of(after, up), tokens_of(before, [3, 1, 7, 5]))
    transports.close()


def test_what_is_asked_of_a_tier_is_in_order():
    """A page is read before what its next owner has is written, on devices and in the tier."""
    here, there = pools(layout(), layout())
    values = coded(here)
    fill(here, values)
    transports = below(here, there)
    move(transports, SOURCE, [3, 1], HOST, [2, 8])
    up = TransferJob(next(_numbers), HOST, TARGET, range(LAYERS), ids([2, 8]), 2)
    down = TransferJob(next(_numbers), SOURCE, HOST, range(LAYERS), ids([5, 7]), 2)
    transports.send(down).result()
    transports.send(up)
    stored = transports.write(down.id, ids([8, 2]))
    transports.write(up.id, ids([6, 4])).result()
    assert stored.result() == 0
    for before, after in zip(values, read(there), strict=True):
        np.testing.assert_array_equal(tokens_of(after, [6, 4]), tokens_of(before, [3, 1]))


def test_what_does_not_connect():
    here, there = pools(layout(), layout(dtype="bfloat16"))
    transports = below(here, there)
    assert transports.connects(SOURCE, HOST) and transports.connects(HOST, SOURCE)
    assert not transports.connects(TARGET, HOST) and not transports.connects(HOST, HOST)
    assert not transports.writes_ahead(SOURCE, HOST)
    with pytest.raises(ValueError, match=r"^job_id=-1: must be a job in flight$"):
        transports.write(-1, ids([1]))
    for form in (layout(tp=2), layout(stages=2), layout(dtype="int8")):
        with pytest.raises(ValueError, match=r"^host/0: stages=.*must be whole, and of a type"):
            HostPool(Pool(HOST, form, 9))
