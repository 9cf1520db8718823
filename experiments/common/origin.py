"""The origin of a number: versions, devices and commit, which every benchmark saves with it."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from pdjax.core.origin import ROOT, commit, versions
from pdjax.flags import program_name
from pdjax.formats.strict_json import dumps

PACKAGES = ("jax", "jaxlib", "numpy")

__all__ = ["ROOT", "commit", "origin", "save", "write_json"]


def origin(*packages: str) -> dict[str, Any]:
    """Return the versions, devices, command and commit of this process; starts JAX if need be.

    Args:
      packages: further packages to give the versions of, where they are installed.
    """
    # The folders of results say nothing to other machines.
    flags = [flag for flag in sys.argv[1:] if not flag.startswith(("--out=", "--plot="))]
    return {
        "versions": versions(*PACKAGES, *packages),
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
