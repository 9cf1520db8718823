"""The map in docs/architecture.md has a line for every folder; every file states its purpose; what
documents name exists: files, headings, modules; what is generated is up to date."""

import ast
import json
import re
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from docs.scripts import configuration, diagrams, families
from tests.helpers.fences import LANGUAGES, ROOT, commands, documents, fences, imports, matches
from tests.helpers.shell import run_command

MAPPED = ("pdjax", "pallas_kernels")
FOLDERS = (*MAPPED, "configs", "experiments", "examples", "tests", "docs")
DOCUMENTS = documents()


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
    for document in DOCUMENTS:
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


def anchors(text: str) -> set[str]:
    """What a link may follow a `#` with: headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def broken_links(document: Path) -> list[str]:
    """List the links of a document to files or headings that do not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(document):
    assert broken_links(document) == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/index.md").read_text("utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert {page for page in pages if f"({page})" not in index} == set()


def case(found: list[dict], name: str) -> dict:
    return next(each for each in found if each["case"] == name)


def headlines() -> dict[str, list[str]]:
    """The numbers of README's table, by the file that its row links to, as that file has them."""

    def read(name: str) -> Any:
        return json.loads((ROOT / "experiments/measured" / name).read_text("utf-8"))

    steps, handoff = read("h200/bench_steps.json"), read("2xh200/handoff.json")["points"][0]
    beside, cpu = read("2xh200/interference.json")["modes"], read("cpu/bench_cpu.json")["systems"]
    decode, prefill = case(steps["decode"], "64x1060"), case(steps["prefill"], "8x1024")
    truth, *mixes = read("2xh200/mixes.json")["mixes"]
    assert truth["mix"] == "one device (truth)"
    exact = all(mix["exact"] == mix["answers"] for mix in mixes)
    words = {10: "ten"}
    return {
        "h200/bench_steps.json": [
            f"{decode['ms']:.2f} ms | {decode['floor_ms']:.2f} ms",
            f"{prefill['tokens_per_s']:,.0f} tokens/s | {100 / prefill['ratio']:.0f}% of",
        ],
        "2xh200/handoff.json": [
            f"{handoff['prompt']:,} tokens, {handoff['served']['nbytes'] / 1e6:.0f} MB",
            f"{handoff['served']['added_ms']:.2f} ms added",
            "all of the time" if handoff["served"]["hidden"] == 1 else "a part of the time",
        ],
        "2xh200/interference.json": [
            f"{beside['disaggregated']['loaded']['itl_ms']['p99']:.1f} ms | "
            f"{beside['disaggregated']['quiet']['itl_ms']['p99']:.1f} ms quiet; "
            f"{beside['colocated']['loaded']['itl_ms']['p99']:.0f} ms where",
        ],
        "2xh200/mixes.json": [
            words[len(mixes)] + " mixes",
            "all tokens exact" if exact else "not all tokens exact",
        ],
        "cpu/bench_cpu.json": [
            f"{cpu['pdjax']['served_ms']['1']:.1f} ms | {cpu['transformers']['bare_ms']['1']:.1f}"
        ],
    }


def test_headline_numbers_are_those_that_were_measured():
    rows = (ROOT / "README.md").read_text("utf-8").split("\n")
    for file, wanted in headlines().items():
        found = "\n".join(row for row in rows if f"measured/{file})" in row and "|" in row)
        for text in wanted:
            assert text in found, f"{file}: {text}"


def inline_commands(text: str) -> list[list[str]]:
    """The commands in a text's code spans; those with a "..." or a name in capitals are forms."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"(?<!`)`((?:python -m|pdjax|make|[A-Z_]+=\S+ python) [^`]+)`", outside)
    plain = [span for span in spans if not re.search(r"\.\.\.|(?<![\w.])[A-Z]{3,}(?![\w=])", span)]
    return [words for span in plain for words in commands(span.replace("\n", " "))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_within_sentences_can_be_given(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in inline_commands(document.read_text("utf-8")):
        run_command(words, runs=False)


def test_commands_of_configs_can_be_given(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in (ROOT / "configs").glob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        for line in re.findall(r"^(?:Run:)? +((?:make|pdjax|python) .*)$", text, re.MULTILINE):
            for words in commands(line):
                run_command(words, runs=False)


def test_a_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_blocks_have_a_language_and_import_what_exists(document):
    for fence in fences(document.read_text("utf-8")):
        assert fence.language in LANGUAGES, f"{document.name}:{fence.line}"
        for module, name in imports(fence.text) if fence.language == "python" else ():
            found = import_module(module)
            assert name is None or hasattr(found, name), f"{document.name}:{fence.line}: {name}"


def test_generated_pages_are_up_to_date():
    """`make docs` writes them."""
    assert configuration.PAGE.read_text("utf-8") == configuration.page()
    assert families.PAGE.read_text("utf-8") == families.page()
    for path, text in diagrams.drawn().items():
        assert path.read_text("utf-8") == text, path.name


def test_a_diagram_that_cannot_be_drawn_is_refused():
    drawing = tomllib.loads("title = 'x'\nsize = [9, 9]\n[[box]]\nid = 'a'\nat = [0, 0, 1, 1]")
    assert "<rect x='0' y='0' width='1'" in diagrams.svg(drawing)
    with pytest.raises(ValueError, match="box 'a': kind='b': allowed are host, "):
        diagrams.svg(drawing | {"box": [drawing["box"][0] | {"kind": "b"}]})
    with pytest.raises(ValueError, match="arrow: no box 'c'; there are a"):
        diagrams.svg(drawing | {"arrow": [{"from": "a", "to": "c"}]})


def test_fences_are_found_with_their_outputs():
    text = "```python hardware\nx\n```\n\n```output\n1\n```\n```bash\nA=1 b \\\n  --c  # d\n```\n"
    first, second = fences(text)
    assert (first.language, first.text, first.line, first.output) == ("python", "x\n", 2, "1\n")
    assert not first.runs and second.runs and second.output is None
    assert commands(second.text) == [["b", "--c"]]
    assert matches("a ... c\n", "a b c") and not matches("a ... c", "a b d")
    with pytest.raises(ValueError, match="not closed"):
        fences("```python\nx\n")


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "pip install '.[nothing]'",
        "pdjax generate --nothing",
        "pdjax generate --prompt=x --config.nothing=1",
        "python -m experiments.template --nothing",
        "python -m pallas_kernels.check --nothing",
        "python examples/nothing.py",
        "ls",
    ],
)
def test_a_command_that_cannot_be_given_is_found(line, capsys):
    [words] = commands(line)
    with pytest.raises(AssertionError, match=re.escape(line.replace("'", ""))):
        run_command(words, runs=False)


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A b\n[x](#a-b) [y](#c) [z](no.md) [w](https://example.org) `make no`\n")
    assert broken_links(page) == ["#c", "no.md"]
    assert inline_commands(page.read_text() + "`pdjax COMMAND` `make x ...`") == [["make", "no"]]
