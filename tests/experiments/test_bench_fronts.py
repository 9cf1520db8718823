"""The benchmark of HTTP: every way gets all of its tokens, and the table has them."""

import json
from pathlib import Path

import pytest

from experiments.bench_fronts import __main__ as bench
from pdjax.flags import status


def test_every_way_streams_all_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "fronts.json"
    words = ["--fronts=0", "--streams=4", "--tokens=16", "--firsts=4", "--clients=2", "--step_ms=2"]
    command = ["bench_fronts", *words, f"--out={out}"]
    assert status(bench.main, bench.FLAGS, bench.__doc__ or "", command) == 0
    found = json.loads(out.read_text())
    ways = {row["way"]: row for row in found["ways"]}
    assert [*ways] == ["direct", "in one", "ceiling, 1", "direct again"]
    for name, way in ways.items():
        assert way["tokens_per_s"] > 0
        if "direct" not in name:
            assert 1 <= way["tokens_per_chunk"] <= 16
    assert ways["in one"]["lag_us"] > 0 and [*found["added_first_ms"]] == ["in one"]
    assert "in one: adds" in capsys.readouterr().out
