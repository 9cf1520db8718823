"""A report is one page that needs nothing else, tells what it was given, and escapes all of it."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pdjax.report.bar_chart import BarChart
from pdjax.report.blocks import Block, Drawing, Facts, Figure, Points, Table, Words
from pdjax.report.line_chart import Axis, LineChart, Series
from pdjax.report.origin import Origin
from pdjax.report.report import Report, Section

ORIGIN = Origin(["pdjax", "explain", "--chips=4"], "a simulation", 7, "c" * 40, {"jax": "9.9"}, "d")
HOSTILE = "<script>alert('a')</script> & \"quoted\""
VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps texts, references and counts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def lines() -> LineChart:
    series = [
        Series("1P3D", [1, 2, 4], [1.0, 0.9, None]),
        Series("4 x", [1, 2, 4], [1.0, 0.5, 0.2]),
    ]
    return LineChart("Attainment", Axis("rate, 1/s"), Axis("share good", least=0, most=1), series)


BARS = BarChart("Where time goes", "ms", [("1P3D", {"queue": 3.0, "decode": 9.0}), ("2P2D", {})])
BLOCKS: list[Block] = [
    Words("A paragraph."),
    Points(["one", "two"]),
    Table("Modes", ["mode", "good", "TTFT, ms"], [["1P3D", 90, 123.456], ["2P2D", None, 0.5]]),
    Facts("Links", {"bytes a second": 300e9}),
    Figure(lines(), "Higher is better."),
    Figure(BARS),
    Drawing(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "A timeline"),
]


def page(blocks: list[Block], title: str = "Should I disaggregate?") -> tuple[str, Page]:
    report = Report(title, ["Yes."], [Section("Modes", blocks)], ORIGIN, {"prefill": {"tp": 2}})
    text = report.html()
    return text, Page(text)


def test_all_that_was_given_is_told():
    text, read = page(BLOCKS)
    for words in ("Should I disaggregate?", "Yes.", "A paragraph.", "one", "Modes", "90", "123.5"):
        assert words in read.texts, words
    for words in ("pdjax explain --chips=4", "a simulation", "7", "c" * 40, "jax 9.9"):
        assert words in read.texts, words
    assert "&#34;tp&#34;: 2" in text and "300,000,000,000" not in text and "3.000e+11" in read.texts
    assert read.count("svg") == 2 and read.count("figure") == 3 == read.count("figcaption")


def test_nothing_is_loaded_from_elsewhere():
    text, read = page(BLOCKS)
    assert read.count("script") == read.count("link") == read.count("iframe") == 0
    for tag, attributes in read.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"url\(|@import|https?://", text)


def test_a_reader_that_sees_nothing_is_told_of_every_table_and_figure():
    _, read = page(BLOCKS)
    assert read.count("table") == read.count("caption") == 3
    assert all(a.get("role") == "img" for tag, a in read.tags if tag == "svg")
    assert all(a.get("alt") for tag, a in read.tags if tag == "img")
    assert all(a.get("scope") for tag, a in read.tags if tag == "th")
    assert "Attainment" in read.texts and "ms, a bar each of: 1P3D, 2P2D" in read.texts
    assert [a for tag, a in read.tags if tag == "html"] == [{"lang": "en"}]


def test_it_is_light_and_dark():
    text, _ = page([])
    assert "prefers-color-scheme: dark" in text and 'content="light dark"' in text
    light, dark = text.split("prefers-color-scheme: dark")
    names = set(re.findall(r"(--\w+):", light))
    assert names == set(re.findall(r"(--\w+):", dark)), "a colour of one scheme is not in the other"


def test_everything_is_escaped():
    blocks: list[Block] = [
        Words(HOSTILE),
        Points([HOSTILE]),
        Table(HOSTILE, [HOSTILE], [[HOSTILE]]),
        Facts(HOSTILE, {HOSTILE: HOSTILE}),
        Figure(BarChart(HOSTILE, HOSTILE, [(HOSTILE, {HOSTILE: 1.0, "b": 1.0})]), HOSTILE),
        Figure(
            LineChart(
                HOSTILE, Axis(HOSTILE), Axis("y"), [Series(HOSTILE, [1], [1])], [(1, HOSTILE)]
            )
        ),
        Drawing(b"", HOSTILE, HOSTILE),
    ]
    text, read = page(blocks, HOSTILE)
    assert "<script" not in text and read.count("script") == 0
    assert read.texts.count(HOSTILE) >= 15


def test_it_is_saved_where_it_is_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "results" / "run" / "report.html"
    Report("Größe", [], [], ORIGIN).save(out)
    assert "Größe" in out.read_text("utf-8") and str(out) in capsys.readouterr().out


def test_an_origin_says_what_this_process_is():
    here = Origin.here(["a"], "two CPU cores", None)
    assert here.versions.keys() >= {"python", "numpy"} and here.facts()["seed"] is None
    found = {"command": ["x"], "devices": ["H200", "H200"], "cores": 8, "commit": None}
    assert Origin.of({**found, "versions": {}}, 3).hardware == "2 x H200; 8 CPU cores"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Table("t", ["a", "b"], [["x"]]), "a row has 1 cells; must have 2"),
        (lambda: Series("s", [1, 2], [1]), "2 xs and 1 ys"),
        (lambda: LineChart("c", Axis("x"), Axis("y"), []), "at least one series"),
        (
            lambda: LineChart("c", Axis("x", log=True), Axis("y"), [Series("s", [0.0], [1])]),
            "above 0",
        ),
        (lambda: BarChart("c", "s", []), "at least one bar"),
        (lambda: BarChart("c", "s", [("a", {"b": -1.0})]), "must be 0 or more"),
        (lambda: BarChart("c", "s", [("a", {"b": float("nan")})]), "finite"),
    ],
)
def test_what_cannot_be_shown_is_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
