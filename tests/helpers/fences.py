"""The fenced blocks of Markdown files, and how the tests run them.

A block's info string is its language and its tags: `python`, `bash`, `output` (what the block
before it prints; "..." stands for any text), `text` (nothing to run). Blocks tagged `hardware`,
`cluster` or `server` are checked and not run.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = {"python", "bash", "output", "text", "toml"}
NOT_RUN = {"hardware", "cluster", "server"}


@dataclass(frozen=True)
class Fence:
    """A fenced block.

    Attributes:
      language, tags: of its info string.
      text: without the fences.
      line: of its first line of text, counted from 1.
      output: text of the `output` block that follows it; None where none does.
    """

    language: str
    tags: frozenset[str]
    text: str
    line: int
    output: str | None = None

    @property
    def runs(self) -> bool:
        return not self.tags & NOT_RUN


def fences(text: str) -> list[Fence]:
    """The fenced blocks of a Markdown text, outputs joined to what prints them."""
    found: list[Fence] = []
    lines = iter(enumerate(text.split("\n"), start=1))
    for number, line in lines:
        if not line.startswith("```"):
            continue
        language, *tags = line.removeprefix("```").split() or [""]
        body = [inner for _, inner in _until_end(lines)]
        joined = "\n".join(body) + "\n"
        if language == "output" and found and found[-1].output is None:
            last = found.pop()
            found.append(Fence(last.language, last.tags, last.text, last.line, joined))
        else:
            found.append(Fence(language, frozenset(tags), joined, number + 1))
    return found


def _until_end(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for number, line in lines:
        if line.startswith("```"):
            return
        yield number, line
    raise ValueError("a fence is not closed")


def commands(text: str) -> list[list[str]]:
    """The commands of a bash block as words; comments and variables before them are left out."""
    joined = text.replace("\\\n", " ")
    found = []
    for line in joined.split("\n"):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


def matches(wanted: str, printed: str) -> bool:
    """Whether a text was printed; "..." stands for any text, and spaces at ends do not count."""
    parts = [re.escape(part) for part in _stripped(wanted).split("...")]
    return re.fullmatch(".*".join(parts), _stripped(printed), re.DOTALL) is not None


def _stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().split("\n"))


def documents() -> list[Path]:
    """Every Markdown file with blocks that are run or checked."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md", *pages]


def imports(code: str) -> list[tuple[str, str | None]]:
    """The (module, name) pairs that a piece of code imports."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, alias.name) for alias in node.names]
    return found
