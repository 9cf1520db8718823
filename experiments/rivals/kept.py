"""Points that are kept as they are measured, so that another command goes on with the rest."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pdjax.formats.strict_json import dumps


class Kept:
    """The points below a folder: points/SYSTEM,RATE,SEED.json, and the lines of their requests in
    records/, under the same name.

    Args:
      folder: where they are, or will be.
      study: what was asked of them, plain values; it is written to study.json.

    Raises:
      ValueError: the folder has points of another study.
    """

    def __init__(self, folder: Path, study: Mapping[str, Any]) -> None:
        self._points, self._records = folder / "points", folder / "records"
        told, path = dumps(study, indent=1, default=str) + "\n", folder / "study.json"
        if path.exists() and path.read_text("utf-8") != told:
            raise ValueError(
                f"out={folder}: has points of a study with another config, size, workload or SLO; "
                "name another folder, or remove it"
            )
        for each in (self._points, self._records):
            each.mkdir(parents=True, exist_ok=True)
        path.write_text(told, "utf-8")

    def has(self, system: str, rate: float, seed: int) -> bool:
        """Whether a point was measured."""
        return self._file(self._points, system, rate, seed, "json").exists()

    def add(self, point: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> None:
        """Keep a point, whose file comes last, so that none is there without its records."""
        which = point["system"], point["rate"], point["seed"]
        lines = "".join(f"{dumps(line)}\n" for line in records)
        self._file(self._records, *which, "jsonl").write_text(lines, "utf-8")
        path = self._file(self._points, *which, "json")
        partial = path.with_suffix(".part")
        partial.write_text(dumps(point, indent=1) + "\n", "utf-8")
        partial.replace(path)

    def points(self) -> list[dict[str, Any]]:
        """All of them, by system and rate; systems in the order in which they were measured."""
        paths = sorted(self._points.glob("*.json"), key=lambda path: path.stat().st_mtime)
        found = [json.loads(path.read_text("utf-8")) for path in paths]
        order = {name: i for i, name in enumerate(dict.fromkeys(p["system"] for p in found))}
        return sorted(found, key=lambda p: (order[p["system"]], p["rate"], p["seed"]))

    def start_s(self, system: str, usual: float) -> float:
        """Seconds that a system took to start, where it has; else the longest of the others, or
        `usual`."""
        seen = {point["system"]: point["start_s"] for point in self.points()}
        return float(seen.get(system, max([usual, *seen.values()])))

    def _file(self, folder: Path, system: str, rate: float, seed: int, ending: str) -> Path:
        return folder / f"{system},{rate:g},{seed}.{ending}"
