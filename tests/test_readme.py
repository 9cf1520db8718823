"""The README's map is true: it names every room that exists, and every path in it exists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("pdjax", "pallas_kernels")
FOLDERS = (*MAPPED, "experiments", "configs", "tests")


def missing_from_map(readme: str, paths: list[str]) -> list[str]:
    """Rooms that the README does not name: folders as `name/`, files as `name.py`."""
    names = {f"{parent.name}/" for path in paths for parent in Path(path).parents if parent.name}
    names |= {Path(path).name for path in paths} - {"__init__.py", "__main__.py"}
    return sorted(name for name in names if not re.search(rf"(?<![\w.]){re.escape(name)}", readme))


def missing_from_tree(readme: str) -> list[str]:
    """Files that the README names by their path and that do not exist."""
    named = re.findall(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w/]*\.py\b", readme)
    return sorted({path for path in named if not (ROOT / path).is_file()})


def test_the_map_names_every_room():
    readme = (ROOT / "README.md").read_text("utf-8")
    files = [file for folder in MAPPED for file in (ROOT / folder).rglob("*.py")]
    assert missing_from_map(readme, [file.relative_to(ROOT).as_posix() for file in files]) == []
    assert missing_from_tree(readme) == []


def test_a_hole_in_the_map_is_found():
    paths = ["pdjax/host/pages.py", "pdjax/host/__init__.py", "pdjax/clock.py"]
    assert missing_from_map("pdjax/ host/ pages.py clock.py", paths) == []
    assert missing_from_map("pdjax/ otherhost/ subpages.py", paths) == [
        "clock.py",
        "host/",
        "pages.py",
    ]
    assert missing_from_tree("see pdjax/no_such_file.py") == ["pdjax/no_such_file.py"]
