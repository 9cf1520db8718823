"""What README, CONTRIBUTING, docs and examples/README tell a reader to type is run: the Python
blocks of a page one after the other, commands in this process, with a tiny model in place of
SmolLM2. README's own answers are compared with those of the real model.

Blocks tagged `hardware` or `cluster` are only checked: `tests/test_docs.py` imports what they
import, and here the flags of their commands are parsed.
"""

from pathlib import Path
from typing import Any

import pytest

from pdjax.config import Config
from pdjax.config.load import load_config
from tests.helpers.fences import ROOT, Fence, commands, documents, fences, matches
from tests.helpers.real_model import CUT
from tests.helpers.shell import run_command
from tests.helpers.stand_in import replace_smollm2, write_model


def blocks(page: Path, language: str) -> list[Fence]:
    return [each for each in fences(page.read_text("utf-8")) if each.language == language]


def pages(language: str) -> list[Any]:
    found = [page for page in documents() if blocks(page, language)]
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in found]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


def run(page: Path, language: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the blocks of a page that are in a language."""
    names: dict = {"__name__": page.stem}
    for fence in blocks(page, language):
        where = f"{page.relative_to(ROOT)}:{fence.line}"
        if language == "python":
            code = compile("\n" * (fence.line - 1) + fence.text, where, "exec")
            if fence.runs:
                exec(code, names)
        else:
            for words in commands(fence.text):
                run_command(words, fence.runs)
        printed = capsys.readouterr().out
        if fence.output is not None and fence.runs:
            assert matches(fence.output, printed), f"{where}: {printed}"


@pytest.mark.parametrize("page", pages("bash"))
def test_commands(page, model, tmp_path, monkeypatch, capsys):
    replace_smollm2(monkeypatch, model)
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "experiments"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    run(page, "bash", capsys)


@pytest.mark.parametrize("page", [each for each in pages("python") if each.id != "README.md"])
def test_python(page, model, tmp_path, monkeypatch, capsys):
    replace_smollm2(monkeypatch, model)
    monkeypatch.chdir(tmp_path)
    run(page, "python", capsys)


@pytest.mark.model
def test_the_answers_of_readme(tmp_path, monkeypatch, capsys):
    def load(source: Any, overrides: Any = None) -> Config:
        return load_config(source, {**(overrides or {}), **CUT})

    monkeypatch.setattr("pdjax.llm.load_config", load)
    monkeypatch.chdir(tmp_path)
    run(ROOT / "README.md", "python", capsys)
