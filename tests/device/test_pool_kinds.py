"""A kind of pool is a file, and a line where it is registered: its transport among the transports.
The coordinator is told the pool's name and layout. See `tests/helpers/host_pool.py`."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from pdjax.config import KVConfig
from pdjax.core.ids import PoolId
from pdjax.core.request import Request, SamplingParams
from pdjax.device.kv.transports import Transports
from pdjax.host.coordinator import Coordinator
from pdjax.host.events import PolledEvents
from pdjax.host.kv.pools import PoolState
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.sequences.sequence import Sequence
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
    transport_of,
)
from tests.helpers.deployment import CONFIG, LAYOUT, MAX_MODEL_LEN, deploy, expected
from tests.helpers.fake_guides import VOCAB
from tests.helpers.fakes import FakePool
from tests.helpers.host_pool import DevicePages, HostPool, HostTransport, Tokens

HOST = PoolId("host/0")


def test_pages_of_devices_go_to_host_memory_and_from_there_to_other_devices():
    """Prefill on a mesh of two devices, decode in two stages, each with pages of its own size."""
    source, target = pools(layout(tp=2), layout(stages=2, page_size=4))
    values = coded(source)
    fill(source, values)
    host = HostPool(Pool(HOST, layout(page_size=4), 9), "float32")
    direct = transport_of(source, target)
    beside = HostTransport({SOURCE: DevicePages(source), TARGET: DevicePages(target)}, host)
    transports = Transports([direct, beside])
    numbers = count()

    def move(here: PoolId, pages: list[int], there: PoolId, to: list[int]) -> None:
        assert transports.connects(here, there)
        job = TransferJob(next(numbers), here, there, range(LAYERS), ids(pages), len(pages))
        transports.send(job).result()
        assert transports.write(job.id, ids(to)).result() == 0

    move(SOURCE, [3, 1, 7, 5], HOST, [2, 8])
    move(HOST, [2, 8], TARGET, [6, 4])
    for before, after in zip(values, read(target), strict=True):
        np.testing.assert_array_equal(tokens_of(after, [6, 4]), tokens_of(before, [3, 1, 7, 5]))
    assert not transports.connects(HOST, HOST)
    assert transports.connects(SOURCE, TARGET)


# In a coordinator.


class FakePages:
    """The pages of a fake engine: a number a layer and token."""

    def __init__(self, pool: FakePool) -> None:
        self._pool = pool

    def _slots(self, pages: np.ndarray) -> np.ndarray:
        size = self._pool.layout.page_size
        return (pages[:, None].astype(np.int64) * size + np.arange(size)).ravel()

    def read(self, layers: range, pages: np.ndarray) -> Tokens:
        slots = self._slots(pages)
        return [[self._pool.contents[layer, slots].reshape(1, -1, 1)] * 2 for layer in layers]

    def write(self, layers: range, pages: np.ndarray, tokens: Tokens) -> None:
        slots = self._slots(pages)
        for layer, (k, _) in zip(layers, tokens, strict=True):
            self._pool.contents[layer, slots] = k.ravel()


@pytest.fixture
def coordinator() -> Coordinator:
    """Fake engines, and a pool of larger pages that none of them has."""
    config = replace(CONFIG, kv=KVConfig(prefix_cache=True))
    config = replace(config, handoff=replace(config.handoff, give_back=True))
    made = deploy(config)
    engines = [*made.prefill, *made.decode]
    pool = Pool(HOST, replace(LAYOUT, page_size=8), 20)
    pages = {engine.pool: FakePages(engine.pages) for engine in engines}
    transports = Transports([HostTransport(pages, HostPool(pool, "int64")), made.transport])
    for engine in engines:
        engine.transport = transports
    return Coordinator(
        config,
        vocab_size=VOCAB,
        max_model_len=MAX_MODEL_LEN,
        end_token_ids=(),
        engines=engines,
        transport=transports,
        events=PolledEvents(made.clock),
        clock=made.clock,
        recorder=Recorder(made.clock),
        pools=[pool],
    )


def answer(coordinator: Coordinator, name: str) -> Sequence:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    [sequence] = coordinator.submit(Request(name, tuple(range(1, 30)), params, 0.0))
    finish(coordinator)
    assert sequence.output == expected(sequence)
    return sequence


def finish(coordinator: Coordinator) -> None:
    while coordinator.has_work:
        coordinator.step()
        coordinator.check()


def pool_of(coordinator: Coordinator, name: str) -> PoolState:
    return coordinator.loop.fleet.pools[PoolId(name)]


def move(coordinator: Coordinator, sequence: Sequence, source: str, target: str) -> None:
    """Let the KV of a sequence that has ended move from one pool to another."""
    ends = pool_of(coordinator, source), pool_of(coordinator, target)
    coordinator.loop.handoffs.give_back(sequence, *ends)
    finish(coordinator)


def findable(coordinator: Coordinator, name: str) -> int:
    prefixes = pool_of(coordinator, name).prefixes
    assert prefixes is not None
    return len(prefixes) * prefixes.page_size


def test_kv_goes_down_to_a_pool_without_an_engine_and_comes_up_again(coordinator):
    """The pools of the engines lose it meanwhile, as when other prompts have filled them."""
    before = answer(coordinator, "before")
    move(coordinator, before, "hbm/prefill-0", HOST)
    assert findable(coordinator, HOST) == 32
    coordinator.start_over(RuntimeError("all pages are free again"))
    assert findable(coordinator, HOST) == findable(coordinator, "hbm/prefill-0") == 0
    before = answer(coordinator, "once more")
    move(coordinator, before, "hbm/prefill-0", HOST)
    index = pool_of(coordinator, "hbm/prefill-0").prefixes
    assert index is not None
    index.clear()
    assert answer(coordinator, "without").cached_tokens == 0
    index.clear()
    move(coordinator, before, HOST, "hbm/prefill-0")
    assert answer(coordinator, "with").cached_tokens == 28


def test_pools_of_one_name_or_of_other_kv_are_refused(coordinator):
    fleet = type(coordinator.loop.fleet)
    engines = [state.engine for state in coordinator.loop.fleet]

    def make(*pools: Pool) -> None:
        fleet(engines, coordinator._transport, CONFIG, MAX_MODEL_LEN, pools)

    make(Pool(HOST, LAYOUT, 3))
    with pytest.raises(ValueError, match=r"^pools: two are called host/0; names must differ$"):
        make(Pool(HOST, LAYOUT, 3), Pool(HOST, LAYOUT, 3))
    with pytest.raises(ValueError, match=r"^pools: two are called hbm/prefill-0; names must"):
        make(Pool(PoolId("hbm/prefill-0"), LAYOUT, 3))
    with pytest.raises(ValueError, match="num_layers"):
        make(Pool(HOST, replace(LAYOUT, planes=LAYOUT.planes[:2]), 3))
