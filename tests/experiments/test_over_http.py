"""What HTTP adds: both ways answer the same requests, and the rows of vLLM are told."""

import json
from pathlib import Path

import pytest

from experiments.over_http import __main__ as experiment
from experiments.over_http.loads import Load, added, summary
from pdjax.flags import status


def test_a_load_is_a_poisson_process_of_its_seed():
    loads = [Load.poisson(10, 100, 4, 2, 50, seed) for seed in (0, 0, 1)]
    assert loads[0] == loads[1] != loads[2]
    [load] = loads[:1]
    assert len(load.arrivals) == len(load.prompts) == 1000
    assert load.arrivals[-1] == pytest.approx(100, rel=0.1)
    assert {len(prompt) for prompt in load.prompts} == {4}


def test_numbers_are_of_requests_and_of_gaps_between_chunks():
    loop = [[0.010, 0.020, 0.030], [0.030, 0.040, 0.050]]
    http = [[0.012, 0.022, 0.033], [0.032, 0.053]]  # the second reader got two tokens at once
    told = summary(http, 3)
    assert told["ttft_p50"] == pytest.approx(22)
    assert told["tpot_p50"] == pytest.approx(10.5)
    assert told["tokens_per_chunk"] == pytest.approx(6 / 5)
    assert added(http, loop, 3) == pytest.approx({"ttft_added": 2, "tpot_added": 0.5})


def test_both_ways_answer_all_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "http.json"
    shapes = ["--model=tiny", "--prompt=16", "--output=4", "--page_size=8", "--rows=2"]
    words = [*shapes, "--rate=20", "--seconds=0.2", "--fronts=0", "--colocated", f"--out={out}"]
    given = experiment.FLAGS, experiment.__doc__ or ""
    assert status(experiment.main, *given, ["over_http", *words]) == 0
    ways = json.loads(out.read_text())["rates"]["20"]
    assert set(ways) == {"in the loop", "over HTTP"}
    for way in ways.values():
        assert way["requests"] == 4 and way["ttft_p50"] > 0 and way["tokens_per_chunk"] >= 1
    assert "20/s: HTTP adds" in capsys.readouterr().out
    assert set(experiment.vllms(10.0)) == set()  # these shapes are not vLLM's
