"""The index of experiments names every one of them, and no other; each says what it asks."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.parent.name for path in ROOT.glob("experiments/*/__main__.py"))


def test_the_index_has_a_row_for_each_experiment():
    rows = re.findall(
        r"^\| [^|]+\? \| `python -m experiments\.(\w+)[^|]*\| [^|]+ \|$",
        (ROOT / "experiments/README.md").read_text("utf-8"),
        re.MULTILINE,
    )
    assert sorted(rows) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_begins_with_its_question(name: str):
    module = importlib.import_module(f"experiments.{name}.__main__")
    text = module.__doc__ or ""
    assert re.match(r"[A-Z][^.:]+\?$", text.split("\n\n")[0], re.DOTALL)
    assert f"python -m experiments.{name}" in text
    assert "out" in module.FLAGS or name in ("bench_host", "load_memory")


def test_each_experiment_has_a_test():
    text = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in NAMES if f"experiments.{name}" not in text] == []


def test_each_measured_file_is_linked():
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    documents += (ROOT / "experiments").rglob("*.md")
    text = "".join(path.read_text("utf-8") for path in documents)
    files = (ROOT / "experiments/measured").glob("*/*")
    names = [path.relative_to(ROOT / "experiments").as_posix() for path in files]
    assert names and [name for name in names if name not in text] == []


def test_the_log_lists_each_entry():
    folder = ROOT / "experiments/log"
    listed = re.findall(r"^\* \[(.+)\]\(([^#)]+)#", (folder / "README.md").read_text("utf-8"), re.M)
    entries = {
        (title, file.name)
        for file in folder.glob("20*.md")
        for title in re.findall(r"^## (.+)$", file.read_text("utf-8"), re.M)
    }
    assert set(listed) == entries
