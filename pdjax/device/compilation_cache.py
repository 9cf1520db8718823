"""Where compiled programs are kept from one start to the next: JAX's persistent compilation cache,
and in a folder of its own there what `pdjax.device.kept` keeps.

A key of JAX's cache holds the program, the devices (of a CPU also its instruction sets), the
versions and the flags of XLA, so one folder serves all models and machines of a user.
"""

import logging
import os
from pathlib import Path

from pdjax.config import NO_CACHE
from pdjax.device.checkpoints.catalog import cache_dir
from pdjax.device.compat import (
    compilation_cache_dir,
    has_compilation_cache,
    keep_compilations,
    keep_no_compilations,
)
from pdjax.device.kept.program import keep_programs
from pdjax.device.kept.store import Store

_LOG = logging.getLogger("pdjax")

_MOST_BYTES = 8 << 30
"""Most bytes of the folder that nobody has named, and of the programs in it; what was used least
recently is dropped first. The programs of SmolLM2 take about 40 MB on a CPU."""

_PROGRAMS = "pdjax"
"""The folder of kept programs."""

_SWITCH = "PDJAX_KEEP_PROGRAMS"
"""Environment variable; "0" leaves programs to JAX's cache alone."""


def use_compilation_cache(asked: str | None) -> None:
    """Keep what is compiled from now on, in the whole process, as `Config.compilation_cache` asks.

    A folder that cannot be written is no error: a warning says so, and programs are not kept.

    Args:
      asked: a folder; `NO_CACHE`; or None, which leaves a setting of JAX alone, be it by
        environment variables or `jax.config`, and otherwise takes the folder `jax` in
        `$PDJAX_CACHE`, or in `pdjax` of `$XDG_CACHE_HOME`, which is `~/.cache` by default.
    """
    if asked == NO_CACHE:
        keep_no_compilations()
    elif asked is not None:
        _use(Path(asked), None)
    elif not has_compilation_cache():
        _use(cache_dir() / "jax", _MOST_BYTES)
    folder = compilation_cache_dir()
    local = folder is not None and "://" not in folder and os.environ.get(_SWITCH) != "0"
    keep_programs(_trusted(Store(Path(folder or "", _PROGRAMS), _MOST_BYTES)) if local else None)


def _trusted(store: Store) -> Store | None:
    if reason := store.distrusted():
        _LOG.warning("compilation_cache: %s; no program is kept there, or read", reason)
        return None
    return store


def _use(folder: Path, most_bytes: int | None) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} is not writable")
    except OSError as error:
        _LOG.warning(
            "compilation_cache: programs are not kept for the next start (%s); name another "
            "folder, or %r",
            error,
            NO_CACHE,
        )
    else:
        keep_compilations(str(folder), most_bytes)
