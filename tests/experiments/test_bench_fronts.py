"""The benchmark of HTTP: every way gets all of its tokens, and the table has them."""

import json
from pathlib import Path

import pytest

from experiments.bench_fronts import __main__ as bench
from pdjax.flags import status


def test_every_way_streams_all_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "fronts.json"
    words = ["--fronts=0", "--streams=4", "--tokens=16", "--firsts=4", "--clients=2", "--pace_ms=2"]
    command = ["bench_fronts", *words, f"--out={out}"]
    assert status(bench.main, bench.FLAGS, bench.__doc__ or "", command) == 0
    ways = json.loads(out.read_text())["ways"]
    assert set(ways) == {
        *("direct, pace", "direct, fast", "direct again, pace", "direct again, fast"),
        *("in one, pace", "in one, fast", "ceiling, 1"),
    }
    for name, way in ways.items():
        assert way["tokens_per_s"] > 0
        if "direct" not in name:
            assert 1 <= way["tokens_per_chunk"] <= 16
    assert ways["in one, pace"]["lag_us"] > 0 and "added_first_ms" in ways["in one, pace"]
    assert "in one, fast" in capsys.readouterr().out
