"""The origin of a number: versions, devices and commit, which every benchmark saves with it."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from pdjax.flags import program_name
from pdjax.formats.strict_json import dumps

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jax", "jaxlib", "numpy")

EXPORTED = "$Format:%H$"
"""The commit, in files that `git archive` wrote; see .gitattributes."""


def origin(*packages: str) -> dict[str, Any]:
    """Return the versions, devices, command and commit of this process; starts JAX if need be.

    Args:
      packages: further packages to give the versions of, where they are installed.
    """
    versions = {"python": platform.python_version()}
    for name in (*PACKAGES, *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    # The folders of results say nothing to other machines.
    flags = [flag for flag in sys.argv[1:] if not flag.startswith(("--out=", "--plot="))]
    return {
        "versions": versions,
        "devices": [device.device_kind for device in jax.devices()],
        "cores": os.cpu_count(),
        "command": [program_name(sys.argv[0]), *flags],
        "commit": commit(),
    }


def write_json(whole: Mapping[str, Any], path: Path) -> None:
    """Write the results as JSON, and make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(whole, indent=1) + "\n")


def save(whole: Mapping[str, Any], path: str | None) -> None:
    """Write the results as JSON, make the folder, and print the path."""
    out = Path(path or "")
    write_json(whole, out)
    print(f"saved {out}")


def commit() -> str | None:
    """Return the commit of these files, with a plus where files of a checkout differ from it or a
    Python file is not in it; None where it is unknown, as in a copy within another checkout."""
    if not EXPORTED.startswith("$"):
        return EXPORTED
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None
        differ = _git("status", "--porcelain", "-uno")
        new = _git("ls-files", "--others", "--exclude-standard", "*.py")
        return _git("rev-parse", "HEAD") + ("+" if differ or new else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*args: str) -> str:
    ran = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    return ran.stdout.strip()
