"""A key of a report: its name, its unit and its meaning."""

from typing import NamedTuple


class Metric(NamedTuple):
    """A key of a report.

    Attributes:
      key: as it is in JSON.
      unit: "1" is a count or a share.
      meaning: what the number says.
    """

    key: str
    unit: str
    meaning: str


def metrics_of(*rows: tuple[str, str, str]) -> tuple[Metric, ...]:
    """The metrics of rows of key, unit and meaning."""
    return tuple(Metric(*row) for row in rows)
