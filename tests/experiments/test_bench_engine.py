"""The benchmark of an engine: its config, and a point with a tiny model."""

from pathlib import Path

import pytest

from experiments.bench_engine import __main__ as bench_engine
from experiments.common.step_times import StepTimes
from pdjax import LLM
from pdjax.config.load import load_config


def test_the_chosen_shapes_have_room_for_what_is_asked():
    config = bench_engine.make_config("tiny", [bench_engine.Point(2, 1024, 128)], True, "x", {})
    spec = config.model.spec
    assert spec is not None and config.model.max_model_len is not None
    assert spec.context >= config.model.max_model_len >= 1024 + 128


POINT = bench_engine.Point(batch=2, prompt=20, output=6)


def test_bench_engine_measures_a_point(tmp_path: Path):
    cache = str(tmp_path)
    config = bench_engine.make_config("tiny", [POINT], True, cache, {"decode.lookahead": "0"})
    assert (config.decode.rows, config.decode.lookahead, config.devices) == (2, 0, 1)
    config = load_config(config, {"compilation_cache": None})  # keeps the other tests' setting
    with LLM(config) as llm:
        assert llm.coordinator.warm_up() == 4  # prefill, with penalties, decode, history
        served = bench_engine.measure(llm, StepTimes(llm), POINT, waves=2, rounds=1)
        with pytest.raises(ValueError, match=r"batch=9: with 26 tokens each needs 18 pages"):
            bench_engine.check_room(llm, bench_engine.Point(9, 20, 6))
    assert served.bare_ms > 0 and served.ratio > 0
    assert served.host_us["dispatch decode"] > 0
    assert served.total_tokens_per_s == pytest.approx(served.output_tokens_per_s * 26 / 6)
    starts = {"cold": {"engines_s": 1.0, "warm_up_s": 2.0}}
    point = {"batch": 2, "prompt": 20, "output": 6, "ratio": served.ratio, **vars(served)}
    lines = bench_engine.show({"points": [point], "starts": starts}).splitlines()
    assert lines[2].startswith("2 x 20 + 6")
    assert lines[-1].split() == ["cold", "1.0", "2.0"]
