"""Links in Markdown point at files, and at headings, that exist."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def documents() -> list[Path]:
    """The Markdown files of the checkout: those that git tracks or would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:  # an export without git
        return [path for path in ROOT.rglob("*.md") if ".venv" not in path.parts]
    return [ROOT / name for name in ran.stdout.splitlines() if (ROOT / name).is_file()]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    titles = re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def broken(document: Path) -> list[str]:
    """List the links to other files of the checkout, or headings, that lead nowhere."""
    found = []
    for link in _LINK.findall(_CODE.sub("", document.read_text("utf-8"))):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = document.parent / path if path else document
        in_text = anchor and target.suffix == ".md" and target.is_file()
        if not target.exists() or (in_text and anchor not in anchors(target.read_text("utf-8"))):
            found.append(link)
    return found


def test_links_lead_somewhere():
    wrong = {str(each.relative_to(ROOT)): links for each in documents() if (links := broken(each))}
    assert wrong == {}


@pytest.mark.parametrize(
    ("link", "is_broken"),
    [
        ("there.md", False),
        ("there.md#a-title-its-own", False),
        ("there.md#another", True),
        ("#here", False),
        ("#there", True),
        ("gone.md", True),
        ("https://example.org/gone.md", False),
    ],
)
def test_a_broken_link_is_found(link: str, is_broken: bool, tmp_path: Path):
    (tmp_path / "there.md").write_text("# A title: its own\n\n```\n# another\n```\n")
    document = tmp_path / "document.md"
    document.write_text(f"## Here\n[link]({link}) `[code](gone)`\n")
    assert broken(document) == [link] * is_broken
