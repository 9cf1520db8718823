"""How long does a start take, cold and warm, and the second LLM of a process?

Each start is a process of its own: without a compilation cache, and with one that an earlier
process has filled. In each, a first LLM is made, answers one token, is closed, and a second one is
made. Then `pdjax generate --stream` runs with the filled cache. With --base the build in that
folder does the same beside it.

Prediction (SmolLM2 on two quiet cores): 35 s without a cache, 15 s with one, the second LLM in a
tenth of that; the first token of `pdjax generate` within 20 s, and no gap of 2 s after it.

  python -m experiments.startup --config=smollm2 --out=results/startup.json
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.common.origin import ROOT, save
from experiments.common.tables import number, table
from pdjax.flags import new_flags, run

FLAGS = new_flags()
_CONFIG = flags.DEFINE_string("config", "smollm2", "preset or config file", flag_values=FLAGS)
_FIELDS = flags.DEFINE_multi_string(
    "field", [], "override of the config, as in --field=decode.rows=8", flag_values=FLAGS
)
_BASE = flags.DEFINE_string("base", None, "checkout of another build", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "results/startup.json", "JSON file to write", flag_values=FLAGS)
_GENERATE = flags.DEFINE_bool("generate", True, "also run `pdjax generate`", flag_values=FLAGS)

COLUMNS = ("wall", "cpu", "weights", "tracing", "lowering", "compiling")
ANSWER = ("--stream", "--ignore_eos", "--max_tokens=64", "--prompt=The capital of France is")


def environment(build: Path, cache: Path | None) -> dict[str, str]:
    """Make the environment of a process that runs a build, with or without a compilation cache."""
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    setting = kept if cache is not None else {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    return {**os.environ, "PYTHONPATH": str(build), **setting}


def start(build: Path, cache: Path | None, config: str, fields: Sequence[str]) -> dict[str, Any]:
    """Measure the phases of one process; see `phases.py`."""
    command = [sys.executable, str(Path(__file__).with_name("phases.py")), config, *fields]
    done = subprocess.run(
        command, env=environment(build, cache), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def watch(command: Sequence[str], env: Mapping[str, str]) -> dict[str, float]:
    """Run a command that writes as it goes: seconds to its first output and to its end, and its
    longest silence between two outputs."""
    began = last = time.perf_counter()
    first, longest = None, 0.0
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while os.read(process.stdout.fileno(), 4096):
            now = time.perf_counter()
            if first is None:
                first = now - began
            else:
                longest = max(longest, now - last)
            last = now
    if process.returncode or first is None:
        raise ValueError(f"{' '.join(command)}: ended with status {process.returncode}")
    return {"first token": first, "longest gap": longest, "end": time.perf_counter() - began}


def generate(build: Path, cache: Path, config: str, fields: Iterable[str]) -> dict[str, float]:
    """Watch `pdjax generate`."""
    main = "from pdjax.cli import main; main()"
    overrides = [f"--config.{field}" for field in fields]
    command = [sys.executable, "-c", main, "generate", f"--config={config}", *overrides, *ANSWER]
    return watch(command, environment(build, cache))


def show(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Make a table with a row for each phase of each start."""
    rows = [
        [name, phase, *(number(parts.get(column), 1) for column in COLUMNS)]
        for name, phases in found.items()
        for phase, parts in phases.items()
        if isinstance(parts, Mapping)
    ]
    return table(["start", "phase", *(f"{column} s" for column in COLUMNS)], rows)


def main() -> None:
    """Run the experiment; see the module."""
    config, fields = _CONFIG.value or "smollm2", _FIELDS.value or []
    builds = {"new": ROOT} | ({"base": Path(_BASE.value).resolve()} if _BASE.value else {})
    found: dict[str, Any] = {}
    answers: dict[str, Any] = {}
    for name, build in builds.items():
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder)
            found[f"{name}, no cache"] = start(build, None, config, fields)
            start(build, cache, config, fields)
            found[f"{name}, filled cache"] = start(build, cache, config, fields)
            if _GENERATE.value:
                generate(build, cache, config, fields)  # its own shapes, too
                answers[name] = generate(build, cache, config, fields)
    print(show(found))
    for name, answer in answers.items():
        parts = ", ".join(f"{key} {seconds:.1f} s" for key, seconds in answer.items())
        print(f"pdjax generate, {name}: {parts}")
    save({"config": config, "fields": fields, "starts": found, "generate": answers}, _OUT.value)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
