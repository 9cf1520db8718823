"""Figures, where matplotlib is installed; a program that draws none needs it not."""

from pathlib import Path
from typing import Any

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, GREY, BLACK = "#56B4E9", "#D55E00", "#999999", "#222222"
"""Colours that the colour-blind can tell apart."""


def new_figure(width: float, height: float) -> Any:
    """Make an empty matplotlib figure of this size, in inches.

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plot: needs matplotlib; pip install 'pdjax[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, PDF or SVG by the path's ending, make the folder, print the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"saved {path}")
