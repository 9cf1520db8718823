"""Writes the table of families in docs/models.md from the registry and the docstrings of the
families' modules.

python -m docs.scripts.families
"""

import inspect
import re
import sys
from pathlib import Path

from pdjax.device.models.registry import FAMILIES

PAGE = Path(__file__).resolve().parent.parent / "models.md"
COLUMNS = "family", "`model_type`", "GGUF `general.architecture`", "what it computes"
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"


def table() -> str:
    """The table: a row for each family that this project ships."""
    shipped = [family for family in FAMILIES.values() if type(family).__module__ in _modules()]
    return HEAD + "\n".join(map(_row, shipped)) + "\n"


def page() -> str:
    """The text of the page with the table as it has to be."""
    text = PAGE.read_text("utf-8")
    start = text.index(HEAD)
    return text[:start] + table() + text[text.index("\n\n", start) + 1 :]


def _modules() -> set[str]:
    return {name for name in sys.modules if name.startswith("pdjax.device.models.")}


def _row(family: object) -> str:
    doc = inspect.getdoc(sys.modules[type(family).__module__]) or ""
    about = " ".join(doc.split("\n\n")[0].split())
    said = re.match(
        r"The (?P<name>.+?) family(?P<of> of text models)?[^:]*: (?P<what>.+?)\.( |$)", about
    )
    assert said is not None, f"{type(family).__module__}: 'The NAME family ...: WHAT.', not {about}"
    kind, gguf = (getattr(family, name) for name in ("name", "gguf"))
    cells = said["name"], f"`{kind}`", f"`{gguf}`" if gguf else "", said["what"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
