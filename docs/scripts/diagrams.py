"""Draws the SVGs of docs/diagrams/ from the TOML files beside them.

    python docs/scripts/diagrams.py

A description has a `size` [width, height] and a `title`, boxes, arrows and labels; see the files.
The same description gives the same bytes. A box's kind is its colour.
"""

import tomllib
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

FOLDER = Path(__file__).resolve().parent.parent / "diagrams"
FONT = "font-family='Helvetica, Arial, sans-serif'"
KINDS = {
    "host": ("#e3edf9", "#2b5c9e"),
    "prefill": ("#fde7d3", "#b85c10"),
    "decode": ("#dff2e1", "#2f7d3b"),
    "door": ("#f1e6f7", "#71408c"),
    "move": ("#fff5c9", "#8f7400"),
    "plain": ("#f4f4f4", "#666666"),
    "frame": ("none", "#999999"),
}
"""Fill and line of each kind of box."""
LINE = 16


def svg(drawing: dict[str, Any]) -> str:
    """Draw a description.

    Raises:
      ValueError: a box of an unknown kind, or an arrow from or to no box.
    """
    width, height = drawing["size"]
    boxes = {box["id"]: box for box in drawing.get("box", ())}
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
        f"width='{width}' height='{height}' role='img'>",
        f"<title>{escape(drawing['title'])}</title>",
        "<defs><marker id='head' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' "
        "markerHeight='7' orient='auto-start-reverse'>"
        "<path d='M0 0 L10 5 L0 10 z' fill='#444444'/></marker></defs>",
        f"<rect width='{width}' height='{height}' rx='10' fill='#ffffff'/>",
        *(_box(box) for box in boxes.values()),
        *(_arrow(arrow, boxes) for arrow in drawing.get("arrow", ())),
        *(
            _text(label["at"], label["text"], label.get("anchor", "middle"), "#333333")
            for label in drawing.get("label", ())
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _box(box: dict[str, Any]) -> str:
    kind = box.get("kind", "plain")
    if kind not in KINDS:
        raise ValueError(f"box {box['id']!r}: kind={kind!r}: allowed are {', '.join(KINDS)}")
    (x, y, width, height), (fill, line) = box["at"], KINDS[kind]
    dash = " stroke-dasharray='6 4'" if kind == "frame" else ""
    rect = (
        f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='6' fill='{fill}' "
        f"stroke='{line}' stroke-width='1.5'{dash}/>"
    )
    text = box.get("text", "")
    lines = len(text.split("\n"))
    top = y + LINE + 2 if kind == "frame" else y + height / 2 - (lines - 1) * LINE / 2 + 5
    return rect + _text([x + width / 2, top], text, "middle", "#222222")


def _text(at: list[float], text: str, anchor: str, color: str) -> str:
    """Lines of text; the first is bold where it begins with a star."""
    out = []
    for number, line in enumerate(text.split("\n")):
        bold = " font-weight='bold'" if line.startswith("*") else ""
        out.append(
            f"<text x='{at[0]:g}' y='{at[1] + number * LINE:g}' text-anchor='{anchor}' "
            f"font-size='13' fill='{color}' {FONT}{bold}>{escape(line.removeprefix('*'))}</text>"
        )
    return "".join(out)


def _arrow(arrow: dict[str, Any], boxes: dict[str, Any]) -> str:
    """A line between the edges of two boxes, or through points of its own."""
    if "points" in arrow:
        points = arrow["points"]
    else:
        for end in (arrow["from"], arrow["to"]):
            if end not in boxes:
                raise ValueError(f"arrow: no box {end!r}; there are {', '.join(boxes)}")
        points = _between(boxes[arrow["from"]]["at"], boxes[arrow["to"]]["at"])
    path = " L".join(f"{x:g} {y:g}" for x, y in points)
    dash = " stroke-dasharray='5 4'" if arrow.get("dashed") else ""
    back = " marker-start='url(#head)'" if arrow.get("both") else ""
    line = (
        f"<path d='M{path}' fill='none' stroke='#444444' stroke-width='1.5'{dash}{back} "
        "marker-end='url(#head)'/>"
    )
    if "text" not in arrow:
        return line
    (x, y), (to_x, to_y) = points[0], points[-1]
    dx, dy = arrow.get("shift", [0, -7])
    return line + _text(
        [(x + to_x) / 2 + dx, (y + to_y) / 2 + dy], arrow["text"], "middle", "#444444"
    )


def _between(source: list[float], target: list[float]) -> list[list[float]]:
    """From the edge of one box to that of another, straight where they face each other."""
    (x, y, w, h), (u, v, s, t) = source, target
    low, high = max(x, u), min(x + w, u + s)
    if low < high and (y + h <= v or v + t <= y):
        middle = (low + high) / 2
        return [[middle, y + h], [middle, v]] if y + h <= v else [[middle, y], [middle, v + t]]
    low, high = max(y, v), min(y + h, v + t)
    middle = (low + high) / 2 if low < high else y + h / 2
    end = middle if low < high else v + t / 2
    return [[x + w, middle], [u, end]] if x + w <= u else [[x, middle], [u + s, end]]


def drawn(folder: Path = FOLDER) -> dict[Path, str]:
    """The SVG of each description of a folder."""
    found = {}
    for file in sorted(folder.glob("*.toml")):
        found[file.with_suffix(".svg")] = svg(tomllib.loads(file.read_text("utf-8")))
    return found


def main() -> None:
    """Write every SVG anew."""
    for path, text in drawn().items():
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
