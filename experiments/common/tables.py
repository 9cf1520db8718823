"""Formats tables for a terminal, and their numbers."""

from collections.abc import Iterable, Sequence


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format columns as wide as their widest cell: the first flush left, the others flush right."""
    lines = [list(headers), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join(
        [line(lines[0]), "  ".join("-" * width for width in widths), *map(line, lines[1:])]
    )


def number(value: float | None, digits: int = 1) -> str:
    """Format a number with `digits` decimals; a dash for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    """Format a share in whole percent; a dash for None."""
    return "-" if share is None else f"{share:.0%}"


def megabytes(count: int) -> str:
    """Format bytes as MB of 10**6 bytes."""
    return f"{count / 1e6:.2f}"
