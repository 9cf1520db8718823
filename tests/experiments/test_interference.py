"""A small run of `interference` on the CPU, its tables and its picture."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.baselines.vllm import BESIDE_PREFILL
from experiments.interference import __main__ as interference
from experiments.interference.__main__ import headline, show
from experiments.interference.load import Load, make_config
from experiments.interference.phases import spread
from experiments.interference.picture import SHARES, draw
from pdjax.flags import status

LOAD = Load(rows=3, prompt=20, long=100, long_output=3, intruders=2, spare=2, steps=12, warm=3)


def sizes(load: Load) -> list[str]:
    return [f"--{name}={value}" for name, value in vars(load).items()]


def test_prefill_beside_decode(tmp_path: Path):
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    flags = [f"--out={out}", f"--plot={plot}", "--model=tiny", "--chunk=64", *sizes(LOAD)]
    flags.append("--config.handoff.layer_groups=1")
    assert status(interference.main, interference.FLAGS, "", ["interference", *flags]) == 0
    whole = json.loads(out.read_text())
    assert plot.stat().st_size > 10_000
    assert (whole["vllm"], whole["load"]) == (None, vars(LOAD))
    for mode, seen in whole["modes"].items():
        for phase in ("quiet", "loaded"):
            point = seen[phase]
            assert (point["gaps"], point["preemptions"]) == (LOAD.rows * LOAD.steps, 0)
            assert point["curve_ms"] == sorted(point["curve_ms"])
            assert 0 < point["host_busy"] <= 1
            # The gaps of a row lie within the phase, or one tick ahead of it.
            longest = point["seconds"] * 1e3 + point["itl_ms"]["max"]
            assert point["itl_ms"]["mean"] * LOAD.steps <= longest, point
        # Each phase has new rows, of the same length in both.
        assert seen["quiet"]["context"] == seen["loaded"]["context"]
        assert "intruders" not in seen["quiet"]
        moved = seen["loaded"]["transfers"]
        assert moved["layout_changing_puts"] == 0
        assert (moved["transfers"] > 0) == (mode == "disaggregated")
        assert seen["loaded"]["intruders"]["prefill_tokens_per_s"] > 0
    assert list(whole["modes"]) == ["disaggregated", "colocated"]


def test_a_load_fits_into_its_config():
    full = replace(LOAD, rows=64, prompt=1024, long=8192, steps=200, warm=20, spare=8)
    config = make_config("llama3_8b", "disaggregated", full, 2048, {"decode.lookahead": "2"})
    assert (config.decode.rows, config.decode.lookahead, config.devices) == (72, 2, 2)
    assert config.prefill.token_buckets == (2048,)
    assert config.decode.page_buckets == (20, 129)
    assert config.model.spec is not None and config.model.spec.context == 8195
    alone = make_config("llama3_8b", "colocated", full, 512, {"kv.page_size": "128"})
    assert (alone.devices, alone.prefill.token_budget, alone.decode.page_buckets) == (
        1,
        512,
        (10, 65),
    )
    bulk = {"handoff.streaming": "False", "handoff.after_tokens": "2"}
    for mode, streaming in ("disaggregated", False), ("colocated", True):
        handoff = make_config("tiny", mode, LOAD, 64, bulk).handoff
        assert (handoff.streaming, handoff.after_tokens) == (streaming, 2)
    with pytest.raises(ValueError, match="long_output=1: must be at least 2"):
        replace(LOAD, long_output=1)


def seen(quiet: float, loaded: float, **more: Any) -> dict[str, Any]:
    """Make phases with equal gaps, in milliseconds."""
    transfers = {"transfers": 2, "layout_changing_puts": 0.0, "bytes_each": 2e6}
    transfers |= {"exposed_ms_each": 0.25, "hidden": 0.75}
    intruders = {"finished": 2, "ttft_ms": {"p50": 400.0, "p99": None}, "prefill_ms": 200.0}
    more = {"transfers": transfers, "intruders": intruders | {"prefill_tokens_per_s": 4e4}}
    host = {"host_busy": 0.5}
    return {
        "quiet": spread([quiet / 1e3] * 10) | host,
        "loaded": spread([loaded / 1e3] * 10) | host | more,
        "budget": 2048,
    }


def test_what_it_comes_to_stands_beside_the_rival(tmp_path: Path):
    modes = {"disaggregated": seen(8.0, 10.0), "colocated": seen(8.0, 60.0)}
    whole = {"model": "llama3_8b", "load": vars(LOAD), "modes": modes, "vllm": BESIDE_PREFILL}
    text = show(whole)
    assert "colocated: p99 60.00 ms under load, 8.00 quiet: 7.50 times" in text
    assert headline(("disaggregated", modes["disaggregated"])).endswith("1.25 times")
    [line] = [line for line in text.splitlines() if line.startswith("colocated loaded")]
    assert line.split()[2:] == ["60.00"] * 4 + ["50%", "9.9", "203.8", "205.0"]
    assert "vLLM" not in show(whole | {"vllm": None})
    draw(whole | {"devices": ["H100", "H100"]}, tmp_path / "plot.svg")
    assert "2 x H100" in (tmp_path / "plot.svg").read_text()


def test_gaps_are_told_by_their_quantiles():
    told = spread([n / 1e3 for n in range(101)])
    assert told["itl_ms"] == pytest.approx(
        {"p50": 50, "p90": 90, "p99": 99, "max": 100, "mean": 50}
    )
    assert told["curve_ms"][499] == 50.0
    assert len(told["curve_ms"]) == len(SHARES) == 999
