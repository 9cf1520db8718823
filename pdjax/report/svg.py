"""Elements of an SVG picture. Colours are classes of the page's style, so that a picture is light
or dark as the page is."""

from xml.etree import ElementTree

COLORS = 8
"""Series that have a colour of their own: classes c0 to c7 of `page.css`; more begin again."""


class Picture:
    """An SVG picture in the making.

    Args:
      width, height: of its view box; the page scales it.
      title: what a reader that sees nothing hears first.
      description: what it shows, in a sentence.
    """

    def __init__(self, width: float, height: float, title: str, description: str) -> None:
        box = {"viewBox": f"0 0 {place(width)} {place(height)}", "role": "img"}
        self.root = ElementTree.Element("svg", box)
        ElementTree.SubElement(self.root, "title").text = title
        ElementTree.SubElement(self.root, "desc").text = description

    def line(self, x1: float, y1: float, x2: float, y2: float, look: str) -> None:
        """Draw a line; `look`: its classes."""
        places = {"x1": place(x1), "y1": place(y1), "x2": place(x2), "y2": place(y2)}
        self._add("line", places, look)

    def path(self, points: list[tuple[float, float]], look: str) -> None:
        """Draw a line from point to point."""
        places = " ".join(f"{place(x)},{place(y)}" for x, y in points)
        self._add("polyline", {"points": places}, look)

    def box(self, x: float, y: float, width: float, height: float, look: str, hint: str) -> None:
        """Draw a box; `hint`: what a pointer over it tells."""
        size = {"width": place(max(width, 0.0)), "height": place(height)}
        self._add("rect", {"x": place(x), "y": place(y), **size}, look, hint)

    def text(self, x: float, y: float, words: str, look: str, *, turned: bool = False) -> None:
        """Write words; `turned`: upwards, around the point."""
        places = {"x": place(x), "y": place(y)}
        if turned:
            places["transform"] = f"rotate(-90 {place(x)} {place(y)})"
        self._add("text", places, look).text = words

    def marker(self, x: float, y: float, series: int, hint: str = "") -> None:
        """Draw the point of a series, in its colour and shape."""
        shapes = (_circle, _square, _diamond, _triangle)
        tag, places = shapes[series % len(shapes)](x, y)
        self._add(tag, places, f"mark {color(series)}", hint)

    def write(self) -> str:
        """The picture as text."""
        return ElementTree.tostring(self.root, encoding="unicode")

    def _add(
        self, tag: str, places: dict[str, str], look: str, hint: str = ""
    ) -> ElementTree.Element:
        element = ElementTree.SubElement(self.root, tag, {**places, "class": look})
        if hint:
            ElementTree.SubElement(element, "title").text = hint
        return element


def color(series: int) -> str:
    """The class of a series' colour."""
    return f"c{series % COLORS}"


def place(value: float) -> str:
    """Write a place in a picture, to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")


def _circle(x: float, y: float) -> tuple[str, dict[str, str]]:
    return "circle", {"cx": place(x), "cy": place(y), "r": "3.6"}


def _square(x: float, y: float) -> tuple[str, dict[str, str]]:
    return "rect", {"x": place(x - 3.3), "y": place(y - 3.3), "width": "6.6", "height": "6.6"}


def _diamond(x: float, y: float) -> tuple[str, dict[str, str]]:
    return _polygon((x, y - 4.8), (x + 4.8, y), (x, y + 4.8), (x - 4.8, y))


def _triangle(x: float, y: float) -> tuple[str, dict[str, str]]:
    return _polygon((x, y - 4.6), (x + 4.4, y + 3.4), (x - 4.4, y + 3.4))


def _polygon(*points: tuple[float, float]) -> tuple[str, dict[str, str]]:
    return "polygon", {"points": " ".join(f"{place(x)},{place(y)}" for x, y in points)}
