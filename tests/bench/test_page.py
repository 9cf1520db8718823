"""The report of a benchmark says what its results say."""

import json
from pathlib import Path

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
