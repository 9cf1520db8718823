"""`pdjax trace`: simulated, on a tiny model, and what it refuses."""

import json
import re
import sys
from pathlib import Path

import pytest

from pdjax import cli
from pdjax.flags import status
from tests.helpers.trace_reader import read_trace

TINY = """
from pdjax.config import RANDOM, Config, DecodeConfig, HandoffConfig, ModelConfig, PrefillConfig
from pdjax.core.model_spec import ModelSpec


def get_config():
    spec = ModelSpec(
        vocab_size=101, num_layers=2, model_dim=16, mlp_dim=16, query_heads=2, kv_heads=1,
        head_dim=8, context=64,
    )
    return Config(
        model=ModelConfig(source=RANDOM, spec=spec),
        prefill=PrefillConfig(token_budget=32, token_buckets=(32,), page_buckets=(4,)),
        decode=DecodeConfig(rows=2, page_buckets=(4,)),
        handoff=HandoffConfig(layer_groups=2),
        warm_up=False,
    )
"""


def run(*args: str) -> int:
    command = cli.COMMANDS["trace"]
    return status(command.main, command.values, command.usage, ["pdjax trace", *args])


def test_a_simulation_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "sim.json"
    args = ("--requests=5", "--prompt_tokens=300", "--config.handoff.layer_groups=4")
    assert run("--backend=sim", f"--out={out}", *args) == 0
    tables = read_trace(out)
    assert tables.execute("select * from stats").fetchall() == []
    [[shipments]] = tables.execute("select count(*) from slice where name like 'layers %'")
    [[flows]] = tables.execute("select count(*) from flow")
    told = capsys.readouterr().out
    assert f"5 hand-offs in {shipments} shipments" in told and flows >= 2 * shipments >= 40
    assert "5 requests in" in told and str(out) in told


def test_the_simulation_of_the_help_page_runs(tmp_path: Path):
    [line] = re.findall("pdjax trace (--backend=sim.*) --plot=", cli.COMMANDS["trace"].usage)
    assert run(*line.split(), f"--out={tmp_path / 'sim.json'}") == 0


def test_a_model_on_devices_is_traced(tmp_path: Path):
    """Compiles two layers of 16 numbers: a second or two."""
    config, out = tmp_path / "tiny.py", tmp_path / "trace.json"
    config.write_text(TINY)
    args = ("--requests=3", "--rate=50", "--prompt_tokens=12", "--max_tokens=4")
    assert run(f"--config={config}", f"--out={out}", *args) == 0
    tables = read_trace(out)
    assert tables.execute("select * from stats").fetchall() == []
    for name in ("tick", "wire", "prefill 1"):
        [[count]] = tables.execute("select count(*) from slice where name = ?", (name,))
        assert count, name
    [[requests]] = tables.execute("select count(*) from process_track")
    assert requests == 3


def test_pictures_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "deep" / "run.svg"
    args = (f"--out={tmp_path / 'trace.json'}", f"--plot={plot}", "--requests=50", "--rate=60")
    assert run("--backend=sim", "--max_tokens=3", *args) == 0
    texts = plot.read_text()
    for name in ("prefill/0", "decode/0", "(and 10 more)", "MB in flight", "free pages"):
        assert f"<!-- {name} -->" in texts, name
    assert "Hand-off of" in plot.with_name("run_handoff.svg").read_text()


def test_a_colocated_run_has_no_handoff_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("matplotlib")
    args = (f"--out={tmp_path / 'trace.json'}", f"--plot={tmp_path / 'run.png'}", "--requests=2")
    assert run("--backend=sim", "--config=smollm2_colocated", *args) == 0
    assert "no hand-off to draw" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.png", "trace.json"]


def test_a_picture_without_matplotlib_is_refused_before_anything_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("--backend=sim", f"--out={tmp_path / 'trace.json'}", "--plot=run.png") == 2
    assert "plot: needs matplotlib; pip install 'pdjax[plot]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--out=", "out='': must name a file"),
        ("--requests=0", "requests=0: must be at least 1"),
        ("--rate=0", "rate=0.0: must be more than 0"),
        ("--prompt=hello", "prompt: a simulation reads no text"),
        ("--prompt_tokens=9000", "must fit into model.max_model_len=1024"),
        ("--plot=run.bmp", "plot='run.bmp': must end in one of .png, .pdf, .svg"),
    ],
)
def test_what_cannot_be_traced_is_refused(
    flag: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    if flag.startswith("--plot"):
        pytest.importorskip("matplotlib")
    assert run("--backend=sim", f"--out={tmp_path / 'trace.json'}", flag) == 2
    assert message in capsys.readouterr().err


def test_the_same_simulation_is_the_same_trace(tmp_path: Path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    for path in (first, second):
        assert run("--backend=sim", f"--out={path}", "--seed=3") == 0
    assert first.read_bytes() == second.read_bytes()
    assert json.loads(first.read_text())["traceEvents"]
