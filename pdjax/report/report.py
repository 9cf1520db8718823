"""One HTML page about a run, which needs nothing but itself: figures, tables, config, origin.

The page loads nothing, runs no script, is light or dark as the reader's screen is, and escapes all
that it is given.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pdjax.formats.strict_json import dumps
from pdjax.report.blocks import Block, Facts, Figure
from pdjax.report.origin import Origin
from pdjax.report.standalone import chart_style

_FOLDER = Path(__file__).parent / "page"


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, and what stands below it."""

    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """A page about a run.

    Attributes:
      title: of the page.
      lead: sentences with the outcome, which stand first.
      sections: in order.
      origin: how it came about.
      config: of the engines, plain values; None where there is none.
    """

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]
    origin: Origin
    config: Mapping[str, Any] | None = None

    def html(self) -> str:
        """The page as text."""
        config = None if self.config is None else dumps(self.config, indent=2, default=str)
        origin = Facts("Command, hardware, seed and code of this report", self.origin.facts())
        return _template().render(report=self, origin=origin, config=config, style=_style())

    def save(self, path: str | Path, tell: Callable[[str], object] = print) -> None:
        """Write the page, make its folder, and tell the path."""
        out = Path(path)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(self.html(), "utf-8")
        tell(f"saved {out}")


def report_path(asked: str | None, out: str | Path) -> Path | None:
    """Where the report of a run goes.

    Args:
      asked: a path; "" for no report; None for `report.html` in a folder named after the results.
      out: the file of the run's results, as results/run.json, whose folder is results/run.
    """
    if asked is None:
        return Path(out).with_suffix("") / "report.html"
    return Path(asked) if asked else None


def _drawn(figure: Figure) -> Markup:
    """A chart, whose own writer has escaped every text."""
    return Markup(figure.chart.draw())


@cache
def _style() -> Markup:
    return Markup(chart_style() + (_FOLDER / "page.css").read_text("utf-8"))


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawn"] = _drawn
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment.get_template("page.html")
