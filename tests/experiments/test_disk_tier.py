"""The experiment of the disk tier's store, small."""

import json
from pathlib import Path

from experiments.disk_tier import __main__ as disk_tier
from pdjax.flags import status


def test_it_answers_its_question(tmp_path: Path, capsys):
    out = tmp_path / "disk_tier.json"
    arguments = ["--total_mb=1", "--page_kib=64", "--threads=2", "--batch_mb=1", "--turns=1"]
    arguments += ["--open_slots=100", f"--folder={tmp_path}", f"--out={out}"]
    assert status(disk_tier.main, disk_tier.FLAGS, "", ["disk_tier", *arguments]) == 0
    whole = json.loads(out.read_text())
    [point] = whole["points"]
    assert point["page_kib"] == 64 and point["threads"] == 2
    assert all(point[kind]["ratio"] > 0 for kind in disk_tier.KINDS)
    assert whole["open"]["slots"] == 100 and whole["checksums_gb_s"]["in use"] > 0
    assert "64 KiB, 2" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["disk_tier.json"]
