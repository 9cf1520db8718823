"""`pdjax explain --memory`: it says what can be worked out by hand, and what bounds it."""

import json
from dataclasses import replace
from typing import Any

import pytest

from pdjax import cli
from pdjax.config import RANDOM, Config, DecodeConfig, KVConfig, ModelConfig, PrefillConfig
from pdjax.config.tiers import TiersConfig
from pdjax.core.model_spec import ModelSpec
from pdjax.explain.memory import JAX_SHARE, Lengths, MemoryPlan, plan_memory, share_of_jax
from pdjax.flags import status

SPEC = ModelSpec(
    vocab_size=100, num_layers=2, model_dim=16, mlp_dim=32, query_heads=4, kv_heads=2, head_dim=4,
    context=64,
)  # fmt: skip
LAYER = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32
WEIGHTS = 4 * (2 * LAYER + 2 * 100 * 16 + 16)
"""Norms of layers are part of their matrices; the last one is not."""
PAGE = 2 * 2 * 2 * 4 * 4 * 16
"""Layers, planes, heads, their dim, bytes an element, tokens."""

CONFIG = Config(
    model=ModelConfig(source=RANDOM, spec=SPEC),
    prefill=PrefillConfig(max_sequences=2, lookahead=0),
    decode=DecodeConfig(rows=6),
)


def planned(config: Config = CONFIG, pages: float = 100, **how: Any) -> MemoryPlan:
    """On chips whose memory holds the weights and so many pages."""
    chip = WEIGHTS + int(pages * PAGE)
    lengths = [Lengths("short", [(10, 7), (20, 14)]), Lengths.longest(64)]
    return plan_memory(config, SPEC, 64, lengths, chip_bytes=chip, **{"share": 1.0} | how)


def test_whole_contexts_that_fit_are_all_that_is_wanted():
    plan = planned()
    prefill, decode = plan.pools
    assert (prefill.id, decode.id, plan.chips) == ("hbm/prefill-0", "hbm/decode-0", 2)
    assert prefill.weight_bytes == decode.weight_bytes == WEIGHTS
    assert decode.free_bytes == 100 * PAGE and decode.page_bytes == PAGE
    assert (prefill.pages, decode.pages, decode.tokens) == (2 * 4, 6 * 4, 6 * 64)
    assert decode.kv_bytes == 25 * PAGE
    assert prefill.bound == "wanted: whole contexts of prefill.max_sequences=2 in each of 1 steps"
    assert decode.bound == "wanted: whole contexts of decode.rows=6"
    assert decode.requests == {"short": (6, "decode.rows"), "64 tokens": (6, "decode.rows")}
    # Prompts of 1 and 2 pages.
    assert prefill.requests == {"short": (8 // 1.5, "pages"), "64 tokens": (2, "pages")}
    assert plan.requests == {"short": 6, "64 tokens": 6}


def test_memory_bounds_pools_and_pages_bound_requests():
    decode = planned(pages=20).pools[1]
    assert decode.pages == 18 - 1  # nine tenths of what is free
    assert decode.bound == "memory: 24 pages are wanted"
    # 16 tokens of KV in 1 page, 33 in 3; a whole context in 4.
    assert decode.requests == {"short": (6, "decode.rows"), "64 tokens": (4, "pages")}


def test_what_programs_take_is_left_to_them():
    assert planned(pages=20, program_bytes=3 * PAGE).pools[1].pages == 20 - 3 - 1 - 1  # 2% slack
    given = replace(CONFIG, kv=KVConfig(memory_fraction=0.5))
    assert planned(given, 20, program_bytes=3 * PAGE).pools[1].pages == 10 - 1


def test_pages_that_the_config_says_are_taken():
    config = replace(CONFIG, decode=DecodeConfig(rows=6, pages=9))
    decode = planned(config).pools[1]
    assert (decode.pages, decode.bound) == (8, "decode.pages, as the config says")


def test_one_pool_for_both_phases():
    [pool] = planned(replace(CONFIG, colocated=True)).pools
    assert (pool.role, pool.pages) == ("mixed", 8 + 24)
    assert "prefill.max_sequences=2" in pool.bound and "decode.rows=6" in pool.bound


def test_engines_share_the_memory_of_their_devices():
    config = replace(CONFIG, shared_devices=True)
    plan = plan_memory(
        config, SPEC, 64, [], chip_bytes=2 * WEIGHTS + 40 * PAGE, share=1.0, program_bytes=0
    )
    assert plan.chips == 1 and {pool.free_bytes for pool in plan.pools} == {40 * PAGE}
    assert [pool.pages for pool in plan.pools] == [8, 24]


def test_a_tier_in_host_memory_holds_what_is_not_under_way():
    config = replace(CONFIG, tiers=TiersConfig(host_gb=50 * PAGE / 1e9))
    plan = planned(config)
    tier = plan.pools[-1]
    assert (tier.id, tier.tier, tier.pages, tier.tokens) == ("host/0", "host", 50, 50 * 16)
    assert tier.requests == {"short": (25, "pages"), "64 tokens": (12, "pages")}
    assert plan.requests == planned().requests, "nothing decodes there"


def test_shards_and_stages_have_their_parts():
    prefill = PrefillConfig(tp=2)
    config = replace(CONFIG, prefill=prefill, decode=DecodeConfig(rows=6, stages=2))
    plan = plan_memory(config, SPEC, 64, [], chip_bytes=10**6)
    assert plan.chips == 4 and [pool.page_bytes for pool in plan.pools] == [PAGE // 2, PAGE // 2]
    assert all(WEIGHTS // 2 < pool.weight_bytes < WEIGHTS for pool in plan.pools)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"share": 0.0}, r"memory_share=0.0: must be in \(0, 1\]"),
        ({"share": 0.5, "pages": 0}, r"memory_gb=.*: JAX may take 50% of that, 0.00 GB, but the"),
        ({"pages": 3}, r"0.9 \(kv.memory_fraction\) of the 0.00 GB.* hold 2 pages"),
        ({"pages": 6, "program_bytes": 3 * PAGE}, r"all but 0.00 GB, which programs take, and 2%"),
    ],
)
def test_what_does_not_fit_is_refused(how: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        planned(**how)


def test_the_environment_says_what_jax_may_take(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert share_of_jax() == JAX_SHARE
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".92")
    assert share_of_jax() == 0.92
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(ValueError, match="XLA_PYTHON_CLIENT_MEM_FRACTION='most'"):
        share_of_jax()


def explain(*args: str) -> int:
    command = cli.COMMANDS["explain"]
    return status(command.main, command.values, command.usage, ["pdjax explain", *args])


LLAMA = ("--memory", "--config=llama3_8b", "--memory_gb=80", "--memory_share=0.9")


def test_the_command_says_it_in_words_and_in_numbers(capsys: pytest.CaptureFixture[str]):
    asked = (*LLAMA, "--input_len=2048", "--output_len=256")
    assert explain(*asked, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    prefill, decode = plan["pools"]
    assert decode["weight_bytes"] == 16_059_998_208  # of 8,029,999,104 weights
    assert decode["page_bytes"] == 64 * 32 * 2 * 8 * 128 * 2
    free = int(80e9 * 0.9) - decode["weight_bytes"]
    assert decode["pages"] + 1 == int(free * 0.9) // decode["page_bytes"]
    assert decode["requests"]["2,048+256 tokens"] == {"count": 64, "bound": "decode.rows"}
    assert decode["requests"]["8,192 tokens"] == {
        "count": decode["pages"] // 128,
        "bound": "pages",
    }
    assert prefill["bound"].startswith("wanted")
    assert explain(*asked, "--programs_gb=1.5") == 0
    told = capsys.readouterr().out
    assert "programs take 1.50 GB" in told and "hbm/decode-0: memory: 8,192 pages are" in told
    assert "64 of 2,048+256 tokens" in told


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*LLAMA, "--chips=4"], "chips: is of a comparison; changes nothing with --memory"),
        ([*LLAMA, "--memory_gb=0"], "memory_gb=0.0: must be more than 0"),
        ([*LLAMA, "--memory_gb=16"], "memory_gb=16: JAX may take 90% of that"),
        (["--programs_gb=1"], "programs_gb=1: is of --memory"),
    ],
)
def test_what_makes_no_sense_is_refused(args, message: str, capsys: pytest.CaptureFixture[str]):
    assert explain(*args) == 2
    assert message in capsys.readouterr().err
