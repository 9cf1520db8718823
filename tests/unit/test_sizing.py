"""Pools take what the weights leave free, where the device says how much that is."""

from dataclasses import dataclass, replace

import jax
import pytest

from experiments.shapes import MODELS
from pallas_kernels.quantised import LIMITS
from pdjax.config import Config, DecodeConfig, KVConfig, ModelConfig, PrefillConfig
from pdjax.device.build import build_engines
from pdjax.device.kv import sizing
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.sizing import Room, free_bytes
from pdjax.device.mesh import DECODE_RULES, make_mesh
from pdjax.kv_layout import QUANTISED_DTYPES, KVLayout

LAYOUT = KVLayout(
    num_layers=5, kv_heads=2, head_dim=4, page_size=8, dtype="float32", itemsize=4, stages=2, tp=2
)


@dataclass
class FakeDevice:
    stats: dict[str, int] | None

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


def device(free: int) -> FakeDevice:
    return FakeDevice({"bytes_limit": 1000 + free, "bytes_in_use": 1000})


def room(fraction: float = 0.5, context: int = 40) -> Room:
    return Room("decode.pages", fraction, LAYOUT, context)


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
    assert replace(LAYOUT, dtype="int8", itemsize=1).head_bytes == 4 + 4


def test_the_fullest_device_decides():
    devices = [device(100 * LAYOUT.device_page_bytes), device(40 * LAYOUT.device_page_bytes)]
    assert room().limit(1000, devices) == 20
    assert room(fraction=1).limit(1000, devices) == 40


def test_no_more_than_wanted():
    assert room().limit(7, [device(10**9)]) == 7


def test_a_platform_that_does_not_say_gets_what_is_wanted():
    assert free_bytes(FakeDevice(None)) is None
    assert free_bytes(FakeDevice({"bytes_in_use": 5})) is None
    assert free_bytes(FakeDevice({"bytes_limit": 4, "bytes_in_use": 5})) == 0
    assert room().limit(1000, [FakeDevice(None)]) == 1000


def test_less_than_one_context_is_refused():
    devices = [device(10 * LAYOUT.device_page_bytes)]
    with pytest.raises(ValueError, match=r"decode.pages=None: 0.5 \(kv.memory_fraction\).*hold 5"):
        room().limit(1000, devices)  # a context is 5 pages, and there is the null page
    with pytest.raises(ValueError, match=r"at least 6, .* 40 tokens \(model.max_model_len\)"):
        room().limit(1000, devices)
    assert room(context=32).limit(1000, devices) == 5


SPLIT = Config(
    model=ModelConfig(source="random", spec=MODELS["tiny"], max_model_len=64),
    kv=KVConfig(memory_fraction=0.5),
    prefill=PrefillConfig(max_sequences=4),
    decode=DecodeConfig(rows=8),
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (11, 11)),  # 4 and 8 contexts of 4 pages are wanted
        ({"decode": DecodeConfig(rows=8, pages=50)}, (11, 50)),
        ({"kv": KVConfig(memory_fraction=1.0)}, (17, 22)),
        ({"colocated": True}, (11, 11)),
        ({"colocated": True, "kv": KVConfig(memory_fraction=1.0)}, (22, 22)),
        (
            {
                "colocated": True,
                "prefill": PrefillConfig(pages=30),
                "decode": DecodeConfig(pages=21),
            },
            (50, 50),
        ),
    ],
)
def test_engines_have_pools_that_fit(change, expected, monkeypatch):
    config = replace(SPLIT, **change)
    assert config.model.spec is not None
    page = replace(LAYOUT, num_layers=3, head_dim=16, page_size=16, stages=1, tp=1)
    monkeypatch.setattr(sizing, "free_bytes", lambda _: 22 * page.device_page_bytes)
    engines = build_engines(config, config.model.spec, 64, None)
    assert (engines.prefill[0].num_pages, engines.decode[0].num_pages) == expected
    assert engines.on_host_cores
