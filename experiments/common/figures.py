"""Figures of results are made and saved as pdjax draws its own: see `pdjax/pictures/figure.py`."""

from pdjax.pictures.figure import new_figure, save_figure

__all__ = ["new_figure", "save_figure"]
