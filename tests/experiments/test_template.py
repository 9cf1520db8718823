"""The template of an experiment: it runs, and says which predictions held."""

import importlib.util
import json
from pathlib import Path

from experiments.template import __main__ as template
from pdjax.flags import status


def test_it_answers_its_question(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    out, plot = tmp_path / "template.json", tmp_path / "template.png"
    arguments = ["--budgets=2048", "--budgets=256", "--requests=8", "--config.decode.rows=8"]
    drawn = importlib.util.find_spec("matplotlib") is not None
    arguments += [f"--out={out}", *[f"--plot={plot}"] * drawn]
    assert status(template.main, template.FLAGS, "", ["template", *arguments]) == 0
    whole = json.loads(out.read_text())
    ways = [(point["way"], point["budget"]) for point in whole["points"]]
    assert ways == [(way, budget) for way in template.WAYS for budget in (256, 2048)]
    assert whole["config"]["decode"]["rows"] == 8 and whole["seed"] == 0
    assert whole["predicted"].keys() == template.outcome(whole["points"]).keys()
    assert whole["commit"] is None or len(whole["commit"].rstrip("+")) == 40
    assert plot.exists() == drawn
    assert "predicted: TTFT falls: right" in capsys.readouterr().out


def test_a_wrong_prediction_is_said_to_be():
    point = dict.fromkeys(template.KEYS, 1.0)
    points = [{"way": way, "budget": n} | point for way in template.WAYS for n in (1, 2)]
    assert set(template.outcome(points).items()) == {
        ("TTFT falls", False),
        ("colocated TPOT grows", False),
        ("colocated gaps grow", False),
        ("disaggregated gaps stay", True),
    }
