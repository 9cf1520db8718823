"""Each example runs, as a user would run it, with a tiny model in place of SmolLM2."""

import ast
import runpy
from pathlib import Path

import pytest

from tests.helpers.fences import ROOT
from tests.helpers.stand_in import replace_smollm2, write_model

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "async_streams": ["0: '", "1: ended with CancelledError(", "2: ended with None"],
    "chat": ["> And of Italy?", "bytes moved"],
    "convert": ["converted in ", " MB in results/smollm2-bfloat16"],
    "disaggregated_on_cpu": ["15 pieces", "three + five devices: [", "one device:           ["],
    "guided": ["members: city, capital", "date: ", "word: "],
    "own_loop": ["'The moon is' arrives"],
    "own_model": ["20,640 parameters answer ["],
    "own_policy": ["fcfs ['long'", "ShortestFirst ['short', 'middle', 'long']"],
    "simulate": ["prefill decode", "94%"],
    "stream": ["[0] ", "[1] ended: length"],
    "write_trace": ["of the requests met both bounds", "open it at"],
}
"""What each one prints, in parts."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example, model, tmp_path, monkeypatch, capsys):
    replace_smollm2(monkeypatch, model)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    for part in SAYS[example.stem]:
        assert part in printed, printed


def test_examples_are_short_and_say_what_one_sees():
    assert {path.stem for path in EXAMPLES} == set(SAYS)
    listed = (ROOT / "examples/README.md").read_text("utf-8")
    for path in EXAMPLES:
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= 40, path.name
        assert "You see " in (ast.get_docstring(ast.parse(text)) or ""), path.name
        assert f"({path.name})" in listed, path.name
