"""A chart as a file of its own, beside the page that shows it."""

from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from pdjax.report.blocks import Chart


@cache
def chart_style() -> str:
    """The colours and looks that charts refer to, as CSS."""
    return (Path(__file__).parent / "page" / "chart.css").read_text("utf-8")


def standalone_svg(chart: Chart) -> str:
    """A chart as an SVG file that needs no page: with its style, its title above it, and, as some
    viewers show none otherwise, a ground."""
    inner = ElementTree.fromstring(chart.draw())
    width, height = inner.attrib["viewBox"].split()[2:]
    whole = float(height) + _HEAD
    root = ElementTree.Element(
        "svg", {"xmlns": _SVG, "viewBox": f"0 0 {width} {whole:g}", "role": "img"}
    )
    ElementTree.SubElement(root, "title").text = chart.title
    ElementTree.SubElement(root, "style").text = chart_style() + _GROUND
    ElementTree.SubElement(root, "rect", {"width": width, "height": f"{whole:g}", "class": "page"})
    heading = {"x": str(float(width) / 2), "y": "20", "class": "middle"}
    ElementTree.SubElement(root, "text", heading).text = chart.title
    below = ElementTree.SubElement(root, "g", {"transform": f"translate(0 {_HEAD:g})"})
    below.extend(child for child in inner if child.tag != "title")
    ElementTree.indent(root, " ")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


_SVG = "http://www.w3.org/2000/svg"
_HEAD = 30.0
_GROUND = "svg .page { fill: var(--ground); }\n"
