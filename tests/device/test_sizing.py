"""Pools take what the weights leave free, where the device says how much that is."""

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import pytest

from experiments.common.shapes import MODELS
from pallas_kernels.quantised import LIMITS
from pdjax.config import (
    Config,
    DecodeConfig,
    HandoffConfig,
    KVConfig,
    ModelConfig,
    PrefillConfig,
)
from pdjax.core.kv_layout import QUANTISED_DTYPES, KVLayout
from pdjax.device import builder as build
from pdjax.device.builder import build_engines
from pdjax.device.claims import Claims
from pdjax.device.devices import dealt
from pdjax.device.kv import sizing
from pdjax.device.kv.host_memory import available_bytes
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.sizing import Claim, deal_pages, free_bytes
from pdjax.device.mesh import DECODE_RULES, make_mesh
from pdjax.device.needs import in_flight_bytes, tier_bytes
from pdjax.host.batching.largest import largest_steps
from pdjax.interfaces.steps import StepKind

LAYOUT = KVLayout.of_heads(
    num_layers=5, kv_heads=2, head_dim=4, page_size=8, dtype="float32", itemsize=4, stages=2, tp=2
)


@dataclass
class FakeDevice:
    stats: dict[str, int] | None
    platform: str = "gpu"

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


def device(free: int) -> FakeDevice:
    return FakeDevice({"bytes_limit": 1000 + free, "bytes_in_use": 1000})


def limit(wanted: int, devices: list[FakeDevice], fraction: float = 0.5, context: int = 40) -> int:
    """Pages of a single pool that is left open."""
    [pages] = deal_pages([claim(wanted, devices, context=context)], fraction)
    return pages


def claim(
    pages: int,
    devices: list[FakeDevice],
    field: str = "decode.pages",
    *,
    fixed: bool = False,
    context: int = 40,
) -> Claim:
    return Claim(field, fixed, pages, LAYOUT, context, devices)


@pytest.mark.parametrize(
    ("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2), ("int8", 1), ("float8_e4m3fn", 1)]
)
def test_a_page_on_a_device_is_what_the_pool_allocates_there(dtype, itemsize):
    mesh = make_mesh(jax.devices()[:4], 2, 2)
    layout = replace(LAYOUT, dtype=dtype, itemsize=itemsize)
    pool = PoolOwner(layout, 3, mesh, DECODE_RULES).arrays
    shards = [array.addressable_shards[0].data for array in jax.tree.leaves(pool)]
    assert sum(shard.nbytes for shard in shards) == 3 * layout.device_page_bytes
    whole = 6 / 5 * layout.page_bytes  # 5 layers fill 6 slots
    assert layout.device_page_bytes * 4 == whole


def test_types_with_scales_are_those_that_kernels_round_to():
    assert set(QUANTISED_DTYPES) == set(LIMITS)
    scaled = replace(LAYOUT, dtype="int8", itemsize=1)
    assert scaled.head_bytes(LAYOUT.planes[0][0]) == 4 + 4


def test_the_fullest_device_decides():
    devices = [device(100 * LAYOUT.device_page_bytes), device(40 * LAYOUT.device_page_bytes)]
    assert limit(1000, devices) == 20
    assert limit(1000, devices, fraction=1) == 40


def test_no_more_than_wanted():
    assert limit(7, [device(10**9)]) == 7


def test_a_platform_that_does_not_say_gets_what_is_wanted():
    assert free_bytes(FakeDevice(None)) is None
    assert free_bytes(FakeDevice({"bytes_in_use": 5})) is None
    assert free_bytes(FakeDevice({"bytes_limit": 4, "bytes_in_use": 5})) == 0
    assert limit(1000, [FakeDevice(None)]) == 1000


def test_less_than_one_context_is_refused():
    devices = [device(10 * LAYOUT.device_page_bytes)]
    with pytest.raises(ValueError, match=r"decode.pages=None: 0.5 \(kv.memory_fraction\).*hold 5"):
        limit(1000, devices)  # a context is 5 pages, and there is the null page
    with pytest.raises(ValueError, match=r"at least 6, .* 40 tokens \(model.max_model_len\)"):
        limit(1000, devices)
    assert limit(1000, devices, context=32) == 5


SPLIT = Config(
    model=ModelConfig(source="random", spec=MODELS["tiny"], max_model_len=64),
    kv=KVConfig(memory_fraction=0.5),
    prefill=PrefillConfig(max_sequences=4, lookahead=0),
    decode=DecodeConfig(rows=8),
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (11, 11)),  # 4 and 8 contexts of 4 pages are wanted
        ({"decode": DecodeConfig(rows=8, pages=20)}, (11, 20)),
        ({"kv": KVConfig(memory_fraction=1.0)}, (17, 22)),
        (  # 2 contexts of each of two steps
            {
                "kv": KVConfig(memory_fraction=1.0),
                "prefill": PrefillConfig(max_sequences=2, lookahead=1),
            },
            (17, 22),
        ),
        ({"colocated": True}, (11, 11)),
        ({"colocated": True, "kv": KVConfig(memory_fraction=1.0)}, (22, 22)),
        (
            {
                "colocated": True,
                "prefill": PrefillConfig(pages=14),
                "decode": DecodeConfig(pages=9),
            },
            (22, 22),
        ),
    ],
)
def test_engines_have_pools_that_fit(change, expected, monkeypatch):
    config = replace(SPLIT, **change)
    assert config.model.spec is not None
    page = KVLayout.of_heads(3, 2, 16, 16, "float32", 4)
    monkeypatch.setattr(sizing, "free_bytes", lambda _: 22 * page.device_page_bytes)
    engines = build_engines(config, config.model.spec, 64, None)
    assert tuple(each.num_pages for each in engines.engines) == expected
    assert engines.on_host_cores
    asked = Claims(config, config.model.spec, 64).of(*dealt(config, jax.devices()))
    for engine, each in zip(engines.engines, 2 * asked, strict=False):
        params: Any = next(iter(engine.programs.values()))
        shards = [x.addressable_shards[0].data for x in jax.tree.leaves(params._params)]
        found = each.weight_bytes(config.model.spec, "float32")
        assert found == sum(shard.nbytes for shard in shards)


@pytest.mark.parametrize(
    ("needs", "pages", "asked"),
    [
        # Of 42 pages, 41 are for pools and programs; 12 and 32 contexts of 4 pages are wanted.
        (lambda pages: 0, [41, 41], 2),
        (lambda pages: 10, [31, 31], 4),
        (lambda pages: 10 if pages > 35 else 15, [26, 26], 6),  # that is not known at first
        (lambda pages: 10 if pages > 35 else 5, [31, 31], 4),  # what fits is not tried anew
    ],
)
def test_pools_leave_what_programs_need(needs, pages, asked, monkeypatch):
    config = replace(SPLIT, kv=KVConfig(), prefill=PrefillConfig(max_sequences=12, lookahead=0))
    config = replace(config, decode=DecodeConfig(rows=32), handoff=HandoffConfig(layer_groups=1))
    assert config.model.spec is not None
    page = KVLayout.of_heads(3, 2, 16, 16, "float32", 4).device_page_bytes
    for file in (sizing, build):
        monkeypatch.setattr(file, "free_bytes", lambda _: 42 * page)
    monkeypatch.setattr(build, "in_flight_bytes", lambda *_: 0)
    seen: list[tuple[set[StepKind], int]] = []

    def program_bytes(programs: Any, steps: Any) -> int:
        kinds, count = {step.kind for step in steps}, programs[0]._pool.num_pages
        assert kinds == {each.kind for each in programs}
        seen.append((kinds, count))
        return needs(count) * page

    monkeypatch.setattr(build, "program_bytes", program_bytes)
    largest = partial(largest_steps, config, context=64)
    engines = build_engines(config, config.model.spec, 64, None, largest=largest)
    assert [each.num_pages for each in engines.engines] == pages
    assert len(seen) == asked and seen[0][1] == 41


def test_a_platform_that_says_nothing_of_programs_keeps_a_tenth(monkeypatch, caplog):
    assert SPLIT.model.spec is not None
    page = KVLayout.of_heads(3, 2, 16, 16, "float32", 4).device_page_bytes
    for file in (sizing, build):
        monkeypatch.setattr(file, "free_bytes", lambda _: 20 * page)
    monkeypatch.setattr(build, "program_bytes", lambda programs, steps: None)
    config = replace(SPLIT, kv=KVConfig())
    largest = partial(largest_steps, config, context=64)
    engines = build_engines(config, SPLIT.model.spec, 64, None, largest=largest)
    assert [each.num_pages for each in engines.engines] == [17, 18]
    assert "does not say what programs need" in caplog.text


def test_kv_in_flight_is_bounded_by_two_contexts_or_by_the_config():
    whole = 5 * LAYOUT.device_page_bytes
    assert in_flight_bytes(LAYOUT, 40, None) == 2 * whole
    assert in_flight_bytes(LAYOUT, 40, 7) == 7
    assert tier_bytes(LAYOUT, 100 * LAYOUT.page_bytes) == 200 * LAYOUT.device_page_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode": DecodeConfig(rows=8, pages=23)}, r"decode.pages=23: .* at most 22 pages fit"),
        (
            {"colocated": True, "prefill": PrefillConfig(pages=30)},
            r"decode.pages=None: .* at least 35, the null page, prefill.pages=30 and one context",
        ),
        (
            {"colocated": True, "decode": DecodeConfig(pages=30)},
            r"prefill.pages=None: .* at least 35, the null page, decode.pages=30 and one context",
        ),
        (
            {
                "colocated": True,
                "prefill": PrefillConfig(pages=30),
                "decode": DecodeConfig(pages=21),
            },
            r"prefill.pages and decode.pages=50: .* at most 22 pages fit",
        ),
    ],
)
def test_pools_that_do_not_fit_are_refused_before_weights_are_read(change, message, monkeypatch):
    config = replace(SPLIT, **change)
    assert config.model.spec is not None
    page = KVLayout.of_heads(3, 2, 16, 16, "float32", 4)
    monkeypatch.setattr(sizing, "free_bytes", lambda _: 22 * page.device_page_bytes)
    monkeypatch.setattr(build, "random_params", None)
    with pytest.raises(ValueError, match=message):
        build_engines(config, config.model.spec, 64, None)


def host(pages: int, monkeypatch: pytest.MonkeyPatch) -> list[FakeDevice]:
    """Four cores of a host that has room for so many pages, each spread over all of them."""
    monkeypatch.setattr(sizing, "available_bytes", lambda: pages * 4 * LAYOUT.device_page_bytes)
    return [FakeDevice(None, "cpu") for _ in range(4)]


def test_pools_share_the_memory_of_the_host(monkeypatch):
    cores = host(80, monkeypatch)
    claims = [claim(26, cores, "prefill.pages"), claim(46, cores)]
    assert deal_pages(claims, 1.0) == [6 + 20 * 28 // 60, 6 + 40 * 28 // 60]  # of half of it
    assert deal_pages(claims, 0.3) == [6, 6]
    assert deal_pages([claim(10, cores, fixed=True), claim(46, cores)], 1.0) == [10, 30]
    assert deal_pages([claim(9, cores), claim(11, cores)], 1.0) == [9, 11]


def test_what_the_host_cannot_hold_is_refused_by_name(monkeypatch):
    cores = host(80, monkeypatch)
    fixed = [claim(50, cores, "prefill.pages", fixed=True), claim(31, cores, fixed=True)]
    with pytest.raises(ValueError, match=r"prefill.pages=50 and decode.pages=31: .*at most 40"):
        deal_pages(fixed, 1.0)
    left_open = [claim(50, cores, "prefill.pages"), claim(31, cores)]
    with pytest.raises(ValueError, match=r"prefill.pages=None and decode.pages=None: .*half of"):
        deal_pages(left_open, 0.2)
    with pytest.raises(ValueError, match=r"\(model.max_model_len\), of which 24 would fit"):
        deal_pages(left_open, 0.2)


def test_a_host_that_says_nothing_gives_what_is_wanted(monkeypatch):
    monkeypatch.setattr(sizing, "available_bytes", lambda: None)
    assert limit(1000, [FakeDevice(None, "cpu")]) == 1000


def test_pools_that_share_a_device_share_what_is_free_on_it():
    devices = [device(100 * LAYOUT.device_page_bytes)]
    assert deal_pages([claim(90, devices), claim(90, devices)], 1.0) == [50, 50]


MEMINFO = "MemTotal: 900 kB\nMemAvailable:  600 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/meminfo": MEMINFO}, 600 * 1024),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/step/memory.current": "5\n",
                "sys/fs/cgroup/job/memory.max": "1000\n",
                "sys/fs/cgroup/job/memory.current": "700\n",
                "sys/fs/cgroup/job/memory.stat": "anon 3\ninactive_file 50\n",
            },
            350,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/x\n4:memory:/outside\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1200\n",
            },
            0,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1200\n",
            },
            600 * 1024,
        ),
        ({"proc/meminfo": "MemAvailable: lots\n", "proc/self/cgroup": "nonsense"}, "half"),
        ({}, "half"),
    ],
)
def test_the_memory_of_the_host_is_what_is_left_of_the_tightest_limit(files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    assert available_bytes(tmp_path) == (half if expected == "half" else expected)


def test_this_host_has_memory():
    found = available_bytes()
    assert found is not None and found > 0
