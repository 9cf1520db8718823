"""Figures for results, where matplotlib is installed; a program that draws none needs it not."""

from pathlib import Path
from typing import Any


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
