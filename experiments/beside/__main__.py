"""Is this build as fast as another one?

Runs an experiment of this checkout and of a folder with another commit in turns, each time in a new
process, so that other work on the machine affects both alike. Compares the numbers that the
experiment saves under paths that match --show: median and range of each build, and the ratio of the
medians.

  git archive --prefix=base/ 4991243 | tar -x -C /tmp
  python -m experiments.beside --base=/tmp/base --turns=5 --show='served_ms|output_tokens' \
      --run='bench_engine --model=llama3_8b --batch=64'

The build that runs first alternates. Prints a table and writes every number as JSON.
"""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from experiments.common.origin import ROOT, origin, save
from experiments.common.tables import table
from pdjax.flags import new_flags, run

FLAGS = new_flags()
_BASE = flags.DEFINE_string("base", None, "folder with the other build", flag_values=FLAGS)
_RUN = flags.DEFINE_string("run", None, "an experiment and its flags", flag_values=FLAGS)
_SHOW = flags.DEFINE_string("show", ".", "regular expression of numbers' paths", flag_values=FLAGS)
_TURNS = flags.DEFINE_integer("turns", 5, "runs of each build", flag_values=FLAGS)
_SECONDS = flags.DEFINE_float(
    "seconds", None, "seconds after which no further turn begins", flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", "results/beside.json", "file to write", flag_values=FLAGS)


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number in a JSON tree, with its path."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from numbers(each, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from numbers(each, f"{path}[{index}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def measure(folder: Path, command: list[str], out: Path) -> dict[str, float]:
    """Run the command once and return its numbers.

    Raises:
      ValueError: the run failed; the message has the end of its output.
    """
    name, *rest = command
    path = filter(None, [os.environ.get("PYTHONPATH")])
    ran = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *rest, f"--out={out}"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *path])},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise ValueError(f"run={shlex.join(command)!r} in {folder}: {ran.stderr[-2000:]}")
    return dict(numbers(json.loads(out.read_text())))


def check_has(folder: Path, name: str) -> None:
    """Check that a checkout has an experiment: a package, or a file as in older ones. Without it
    Python would look on, and might run that of an installed checkout.

    Raises:
      ValueError: it has not.
    """
    wanted = [folder / f"experiments/{name}/__main__.py", folder / f"experiments/{name}.py"]
    if not any(map(Path.is_file, wanted)):
        raise ValueError(f"run={name!r}: no such experiment in {folder}")


def spread(values: list[float]) -> str:
    """Format the median and the range."""
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def main() -> None:
    """Run, print, save; see the module."""
    if not _BASE.value or not _RUN.value:
        raise ValueError("beside: needs both --base=FOLDER and --run='EXPERIMENT FLAGS'")
    folders = {"base": Path(_BASE.value).resolve(), "here": ROOT}
    command = shlex.split(_RUN.value)
    for folder in folders.values():
        check_has(folder, command[0])
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(_TURNS.value or 1):
            if turn and _SECONDS.value and time.monotonic() - began > _SECONDS.value:
                break
            for name in list(folders)[:: -1 if turn % 2 else 1]:
                out = Path(scratch) / "numbers.json"
                seen[name].append(measure(folders[name], command, out))
                print(f"turn {turn + 1}: {name}", flush=True)
    runs = [run for of_build in seen.values() for run in of_build]
    rows = []
    for key in runs[0]:
        if re.search(_SHOW.value or ".", key) and all(key in run for run in runs):
            base, here = ([run[key] for run in seen[name]] for name in folders)
            middle = statistics.median(base)
            ratio = f"{statistics.median(here) / middle:.4f}" if middle else "-"
            rows.append([key, spread(base), spread(here), ratio])
    print(table(["number", "base: median (range)", "here", "ratio"], rows))
    save(origin() | {"run": command, "seen": seen}, _OUT.value)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
