"""The map in docs/architecture.md has a line for every folder; every file states its purpose, and
files that README and docs name exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("pdjax", "pallas_kernels")
FOLDERS = (*MAPPED, "configs", "experiments", "tests", "docs")


def missing_from_map(text: str, paths: list[str]) -> list[str]:
    """List the folders of Python files that the map does not name as `name/`."""
    names = {f"{parent.name}/" for path in paths for parent in Path(path).parents if parent.name}
    return sorted(name for name in names if not re.search(rf"(?<![\w.]){re.escape(name)}", text))


def missing_from_tree(text: str) -> list[str]:
    """List the missing files that a text names by their path."""
    named = re.findall(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w/]*\.(?:py|md)\b", text)
    return sorted({path for path in named if not (ROOT / path).is_file()})


def python_files() -> list[Path]:
    return [file for folder in MAPPED for file in (ROOT / folder).rglob("*.py")]


def test_the_map_names_every_folder():
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    paths = [file.relative_to(ROOT).as_posix() for file in python_files()]
    assert missing_from_map(text, paths) == []


def test_what_the_documents_name_exists():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert missing_from_tree(document.read_text("utf-8")) == [], document.name


def test_every_file_says_what_it_is_for():
    silent = [
        file.relative_to(ROOT).as_posix()
        for file in python_files()
        if (text := file.read_text("utf-8")) and not ast.get_docstring(ast.parse(text))
    ]
    assert silent == []


def test_a_hole_in_the_map_is_found():
    paths = ["pdjax/host/pages.py", "pdjax/host/kv/__init__.py"]
    assert missing_from_map("pdjax/ host/ kv/", paths) == []
    assert missing_from_map("pdjax/ otherhost/", paths) == ["host/", "kv/"]
    assert missing_from_tree("see pdjax/no_such_file.py") == ["pdjax/no_such_file.py"]
