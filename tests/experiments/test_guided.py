"""A small run of `guided` on the CPU, its ratios, and its random vocabulary."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.guided import __main__ as experiment
from experiments.guided.forms import FORMS, form_maker, random_tokenizer
from experiments.guided.phases import Phase
from pdjax.flags import status


def test_rows_decode_beside_guided_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "guided.json"
    shapes = ["--model=tiny", "--rows=3", "--prompt=16", "--page_size=8", "--colocated"]
    load = ["--guided=1", "--steps=4", "--warm=1", "--turns=2", "--forms=any", f"--out={out}"]
    given = experiment.FLAGS, experiment.__doc__ or ""
    assert status(experiment.main, *given, ["guided", *shapes, *load]) == 0
    first, second = json.loads(out.read_text())["turns"]
    cases = [(each["way"], each["form"], each["guided"]) for each in first]
    assert cases == [(w, *of) for w in ("sits out", "waits") for of in [("", 0), ("any", 1)]]
    assert [(each["way"], each["form"], each["guided"]) for each in second] == cases[::-1]
    for seen in first:
        assert seen["itl_ms"]["p50"] > 0 and seen["ratio"]["p50"] > 0
        assert (seen["mask_us"] is not None) == (seen["guided"] == 1)
    assert "waits, 1 any" in capsys.readouterr().out
    bad = ["guided", *shapes, *load, "--guided=3"]
    assert status(experiment.main, *given, bad) != 0
    assert "must be between 1 and rows - 1" in capsys.readouterr().err


def test_ratios_are_of_the_same_rows():
    none = np.zeros(0)
    quiet = Phase(np.array([[2.0, 2.0], [2.0, 2.0], [9.0, 9.0]]), none, none)
    guided = Phase(np.array([[3.0, 3.0], [3.0, 3.0]]), np.array([6.0]), np.array([50.0]))
    assert experiment.ratios(quiet, guided) == {"p50": 1.5, "p99": 1.5}
    assert quiet.to_json()["guided_itl_ms"] is None


def test_forms_go_on_over_a_random_vocabulary():
    pytest.importorskip("llguidance")
    vocab_size = 2048
    first, second = (random_tokenizer(vocab_size) for _ in range(2))
    tokens = [first.decode([i]) for i in range(vocab_size)]
    assert tokens == [second.decode([i]) for i in range(vocab_size)]
    assert sum(token[:1] == " " and token[1:].isalpha() for token in tokens) > vocab_size / 4
    make, rng = form_maker(vocab_size), np.random.default_rng(0)
    for form in FORMS:
        guide = make(form)
        for _ in range(50):
            bits = np.unpackbits(guide.mask().view(np.uint8), bitorder="little")[:vocab_size]
            guide.push(int(rng.choice(np.flatnonzero(bits))))
            assert not guide.complete
