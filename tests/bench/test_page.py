"""The report of a benchmark says what its results say."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pdjax.sim.calibration import Calibration
from tests.bench.test_command import GOODPUT, SIM, bench
from tests.report.test_report import Page


def page(folder: Path, *args: str) -> tuple[dict, Page]:
    assert bench(*SIM, *GOODPUT, f"--out={folder}/run.json", *args) == 0
    whole = json.loads((folder / "run.json").read_text())
    return whole, Page((folder / "run" / "report.html").read_text("utf-8"))


def test_a_run_has_its_latencies_waits_and_engines(tmp_path: Path):
    whole, read = page(tmp_path, "--request_rate=20")
    words = " ".join(read.texts)
    assert f"{whole['completed']} of {whole['num_prompts']} requests completed" in words
    assert f"{whole['slo_good']} of {whole['slo_total']} were good: TTFT 300 ms" in words
    assert f"{whole['median_ttft_ms']:.4g}" in words and "simulated: 2 chips" in words
    assert all(name in words for name in whole["engines"]) and all(
        n in words for n in whole["links"]
    )
    assert read.count("svg") == 2 and "row wait" in words and "pdjax bench" in words


def test_a_simulation_says_what_its_steps_cost(tmp_path: Path, capsys):
    whole, read = page(tmp_path)
    words = " ".join(read.texts)
    assert "simulated: 2 chips, constant costs" in words and "a decode tick 7 ms" in words
    assert whole["costs"]["name"] is None and whole["costs"]["coefficients"]["tick"] == 7e-3
    assert "constants that were measured on no hardware" in capsys.readouterr().out
    whole, read = page(tmp_path, "--config=llama3_8b", "--costs=h200")
    words, known = " ".join(read.texts), Calibration.load("h200")
    assert "simulated: 2 x NVIDIA H200" in words
    assert all(sentence in words for sentence in known.validity())
    assert whole["costs"]["coefficients"] == asdict(known.costs)
    assert known.link is not None and whole["costs"]["link"] == asdict(known.link)
    assert whole["model_id"] == whole["config"]["model"]["source"]
    assert "on NVIDIA H200, for llama3_8b" in capsys.readouterr().out


def test_measured_costs_are_what_the_simulation_takes(tmp_path: Path):
    """One request alone: its time between tokens is that of a tick of one row."""
    args = ("--config=llama3_8b", "--num_prompts=1", "--input_len=2048", "--output_len=9")
    assert bench("--backend=sim", f"--out={tmp_path}/run.json", *args, "--costs=h200") == 0
    whole, costs = json.loads((tmp_path / "run.json").read_text()), Calibration.load("h200").costs
    tick = costs.tick + costs.tick_row + 2053 * costs.tick_kv_token
    assert whole["median_tpot_ms"] == pytest.approx(1e3 * tick, rel=0.05)


def test_rates_are_compared(tmp_path: Path):
    whole, read = page(tmp_path, "--rates=10,40")
    words = " ".join(read.texts)
    assert "Rates compared" in words and "Good requests over rate" in words
    assert f"Capacity goodput: {whole['capacity']['rate']:.4g} requests a second" in words


def test_none_is_written_where_none_is_asked_for(tmp_path: Path):
    assert bench(*SIM, f"--out={tmp_path}/run.json", "--report=") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert bench(*SIM, f"--out={tmp_path}/run.json", f"--report={tmp_path}/own.html") == 0
    assert (tmp_path / "own.html").is_file()
