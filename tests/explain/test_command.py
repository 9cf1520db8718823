"""`pdjax explain`: its tables, numbers and report say the same, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from pdjax import cli
from pdjax.flags import status
from tests.report.test_report import Page

SMALL = (
    *("--chips=2", "--num_prompts=12", "--input_len=600", "--output_len=6", "--budgets=512"),
    *("--resolution=0.9", "--slo_scales=0.5,1", "--request_rate=16", "--goodput=ttft:60"),
    "--modes=disaggregated,dynamic,mixed",
)
"""Fewer modes and steps of bisection than by default; tests/test_readme.py runs docs/explain.md,
whose command has all modes."""


def explain(*args: str) -> int:
    command = cli.COMMANDS["explain"]
    return status(command.main, command.values, command.usage, ["pdjax explain", *args])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small comparison: its folder, and its numbers."""
    folder = tmp_path_factory.mktemp("explain")
    assert explain(*SMALL, f"--out={folder}/run.json") == 0
    return folder, json.loads((folder / "run.json").read_text())


def test_numbers_are_whole_and_counted(told):
    _, whole = told
    assert [mode["kind"] for mode in whole["modes"]].count("disaggregated") == 1
    assert {mode["name"] for mode in whole["modes"]} == set(whole["bottlenecks"])
    rates = [mode["capacity"]["rate"] or 0 for mode in whole["modes"]]
    assert rates == sorted(rates, reverse=True) and rates[0] > 0
    for mode in whole["modes"]:
        assert mode["capacity"]["per_gpu"] == mode["capacity"]["rate"] / 2
        for trial in mode["trials"]:
            assert trial["slo_total"] == 12 == trial["completed"]
            assert trial["median_ttft_ms"] <= trial["p90_ttft_ms"] <= trial["p99_ttft_ms"]
            for role in trial["load"]["roles"].values():
                assert all(0 <= busy <= 1 + 1e-9 for busy in role["busy"])
    assert 16.0 in whole["rates"]
    for metric, reigns in whole["winners"].items():
        assert reigns[0]["start"] == whole["rates"][0], metric
        assert reigns[-1]["end"] == whole["rates"][-1], metric
    assert len(whole["slo_grid"]) == 4
    [usual] = [c for c in whole["slo_grid"] if (c["ttft_scale"], c["tpot_scale"]) == (1, 1)]
    assert whole["modes"][0]["name"] in usual["winners"] and usual["rate"] == rates[0]


def test_the_costs_are_named(told):
    _, whole = told
    costs = whole["costs"]
    assert (costs["name"], costs["hardware"], costs["model"]) == (
        "h200",
        "NVIDIA H200",
        "llama3_8b",
    )
    assert any("Mixed steps were not measured" in line for line in costs["validity"])
    assert costs["sources"] and costs["points"] and costs["link"]["bandwidth"] > 0


def test_the_report_says_what_the_numbers_say(told):
    folder, whole = told
    page = Page((folder / "run" / "report.html").read_text("utf-8"))
    words = " ".join(page.texts)
    assert whole["verdict"] in words
    for warning in whole["warnings"]:
        assert warning in words
    for mode in whole["modes"]:
        assert mode["name"] in words
        for sentence in whole["bottlenecks"][mode["name"]]["sentences"]:
            assert sentence in words
    assert page.count("svg") >= 5 and page.count("table") >= 6
    assert "simulated: 2 x NVIDIA H200" in words


def test_the_same_command_says_the_same(told, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, whole = told
    args = (f"--out={tmp_path}/again.json", "--report=", "--json")
    assert explain(*SMALL, *args) == 0
    again = json.loads(capsys.readouterr().out)
    for key in ("modes", "winners", "slo_grid", "bottlenecks", "verdict"):
        assert again[key] == whole[key], key
    assert not (tmp_path / "again").exists(), "no report was asked for"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--costs=h300"], "costs='h300': must be one of h100, h200"),
        (["--config.model.dtype=float32"], "model.dtype='float32': the calibration h200"),
        (["--modes=magic"], "modes='magic': allowed are disaggregated"),
        (["--budgets=many"], "budgets=many: must be tokens"),
        (["--slo_scales=0"], "slo_scales=0: must be more than 0"),
        (["--rates=x"], "rates=x: must be numbers"),
        (["--goodput=speed:1"], "goodput='speed:1': must be one of"),
        (["--resolution=2"], "resolution=2.0: must be in (0, 1)"),
        (["--share=0"], "share=0.0: must be in (0, 1]"),
        (["--max_concurrency=4"], "max_concurrency: a closed loop has no rates"),
        (["--request_rate=inf"], "request_rate=inf: a search must begin"),
        (["--memory_gb=10"], "memory_gb=10: must be more than the weights"),
        (["--link_gb_s=-1"], "bandwidth=-1000000000.0: must be more than 0"),
        (["--link_ms=5"], "link_ms=5: is of a link that is given; say --link_gb_s, too"),
        (["--out="], "out='': must name a file"),
        (["--config.decode.stages=2"], "decode.stages=2: must be 1"),
        (["--chips=0"], "chips=0: must be at least 2"),
    ],
)
def test_what_makes_no_sense_is_refused(args, message: str, capsys: pytest.CaptureFixture[str]):
    assert explain(*args) == 2
    told = capsys.readouterr().err
    assert told.startswith("pdjax explain: ") and message.split(":")[0] in told
