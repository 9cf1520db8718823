"""The benchmark of scale, tiny: it counts, compares, and says where two builds differ."""

import copy
from pathlib import Path

from experiments.bench_scale import __main__ as bench_scale
from experiments.bench_scale import this_build
from experiments.bench_scale.tables import (
    compared,
    coordinator_seconds,
    host_table,
    latency_table,
    ratio_table,
)
from experiments.common.origin import ROOT


def test_a_tiny_run_is_counted():
    result = this_build.drive(bench_scale.job(engines=2, requests=6, rate=10.0, seed=0))
    assert len(result["requests"]) == len(result["tokens"]) == 6
    assert 0 < coordinator_seconds(result) < result["cpu_s"]
    assert result["events"] > 0 and result["turns"] > 0
    found = {2: {"new": [result]}}
    assert "2+2" in host_table(found) and "2+2" in latency_table(found)
    assert compared(found[2]) is None


def test_a_build_is_driven_by_the_script_that_knows_its_doors(tmp_path: Path):
    assert bench_scale.script_of(ROOT).name == "this_build.py"
    assert bench_scale.script_of(tmp_path).name == "this_build.py"
    (tmp_path / "pdjax").mkdir()
    (tmp_path / "pdjax/engine_api.py").touch()
    assert bench_scale.script_of(tmp_path).name == "older_build.py"
    assert bench_scale.script_of(tmp_path).is_file()


def result():
    return {
        "cpu_s": 4.0,
        "wall_s": 8.0,
        "simulator_s": 2.0,
        "simulated_s": 10.0,
        "turns": 100,
        "events": 50,
        "requests": [["r0#0", 0.5, 0.007, 3.0], ["r1#0", 0.25, None, 2.0]],
        "tokens": {"r0#0": [1, 2], "r1#0": [3]},
    }


def test_time_of_the_simulator_is_left_out():
    assert coordinator_seconds(result()) == 3.0


def test_builds_that_agree_are_said_to():
    builds = {"new": [result(), result()], "base": [result(), result()]}
    outcome = compared(builds)
    assert outcome is not None and outcome["steady"] and outcome["other_tokens"] == []
    text = latency_table({1: builds})
    assert "2 of 2 requests have the same tokens" in text
    assert "ttft the same; tpot the same; finish the same" in text
    assert "1.000" in ratio_table({1: builds})


def test_what_differs_is_named():
    new = copy.deepcopy(result())
    new["tokens"]["r1#0"] = [4]
    new["requests"][0] = ["r0#0", 0.5 - 2e-3, 0.007, 3.0 + 1e-3]
    outcome = compared({"new": [new, result()], "base": [result(), result()]})
    assert outcome is not None
    assert not outcome["steady"] and outcome["other_tokens"] == ["r1#0"]
    assert outcome["ttft"]["earlier"] == 1 and outcome["ttft"]["later"] == 0
    assert outcome["finish"]["largest"][0] == "r0#0"
    text = latency_table({1: {"new": [new, result()], "base": [result(), result()]}})
    assert "ttft earlier for 1, later for 0, on average by -1000.0 us" in text
    assert "at most -2000.0 us (r0#0)" in text
