"""The origin of a number: the commit of this code and the versions of packages."""

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

EXPORTED = "$Format:%H$"
"""The commit, in files that `git archive` wrote; see .gitattributes."""


def versions(*packages: str) -> dict[str, str]:
    """Return the version of Python, and of those of `packages` that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


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
