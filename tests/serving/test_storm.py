"""A storm of clients, of which a third leave: nothing is held for them afterwards. The engines are
simulated; session, coordinator, pages and rows are the real ones. `experiments.storm` is the long
storm."""

import asyncio
import gc
import os
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from experiments.storm import __main__ as experiment
from experiments.storm.clients import SHARES, Target, drawn, storm
from experiments.storm.config import get_config
from pdjax.async_llm import AsyncLLM
from pdjax.config.load import load_config
from pdjax.serving.async_backend import AsyncBackend
from pdjax.serving.front import Settings
from tests.helpers.fake_backend import Served, served

CLIENTS = 150


def connections() -> int:
    """Connections that something still refers to, whether open or not."""
    gc.collect()
    return sum(isinstance(each, H11Protocol) for each in gc.get_objects())


def held(at: Served) -> tuple[int, int, int]:
    """Tasks of the event loop, descriptors and threads of the process."""

    async def tasks() -> int:
        return len(asyncio.all_tasks())

    count = asyncio.run_coroutine_threadsafe(tasks(), at.loop).result(20)
    return count, len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted in /proc")
def test_a_storm_leaves_nothing_behind():
    config = load_config(get_config(), {"max_waiting": 12})
    llm = AsyncLLM(config, backend="sim", progress=False)
    with served(lambda: AsyncBackend(llm), Settings(stall_s=0.3)) as at:
        url = urlsplit(at.url)
        assert url.hostname is not None and url.port is not None
        target = Target(url.hostname, url.port, 101, prompt=100, output=60, idle_s=0.5)
        found, before = [], connections()
        for wave in range(2):  # the first one starts threads that stay
            outcomes = asyncio.run(storm(target, drawn(CLIENTS, wave), 24, wave))
            at.until(lambda: not at.front.requests and not at.front.answers)
            at.until(lambda: not llm.llm.session.has_work and not at.server.server_state.tasks)
            at.until(lambda: not at.server.server_state.connections)
            found.append(held(at))
            assert connections() <= before  # other tests may have left some
            assert outcomes["stream: 200"] > 20 < outcomes["whole: 200"]
            assert {name.split(":")[0] for name in outcomes} == set(SHARES)
        assert found[0] == found[1]
        loop = llm.llm.coordinator.loop
        assert not llm.llm.session.book.entries and not loop.lifecycle.live
        assert not any(pool.allocator.used_pages for pool in loop.fleet.pools.values())
        assert all(not each.decoding and not each.running for each in loop.fleet)
        llm.llm.coordinator.check()


def test_the_experiment_says_what_is_left():
    point: dict[str, float] = dict.fromkeys(("pages", "rows", "steps", "sequences", "answers"), 0)
    point |= {"clients": 0, "descriptors": 7, "threads": 12, "resident_mb": 300.0}
    assert all(experiment.outcome([point, point, point]).values())
    for fault, what in (
        ({"pages": 1}, "nothing is held"),
        ({"descriptors": 8}, "no descriptor is left"),
        ({"threads": 13}, "no thread is left"),
        ({"resident_mb": 310.0}, "memory is flat"),
    ):
        held = experiment.outcome([point, point, point | fault])
        assert [name for name, right in held.items() if not right] == [what]
