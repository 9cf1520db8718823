"""Does the coordinator's cost for the host grow with events or with engines?

The production coordinator serves simulated engines on a virtual clock (`pdjax/sim`), at several
sizes and the same load an engine. Each run is a process of its own; with --base the build in
another checkout serves the same requests on engines of the same costs, in turns with this one.
Tokens must be the same, and latencies on the virtual clock are compared.

  git archive 4991243 | tar -x -C base
  python -m experiments.bench_scale --base=base --out=results/scale.json

Times are processor time of the process, since the machine may have other work; "of the coordinator"
leaves out what simulating engines and links takes. Where a size is run several times the median is
shown, and the spread is from the fastest to the slowest, as shares of it.
"""

import json
import os
import platform
import pstats
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from experiments.bench_scale.tables import compared, host_table, latency_table, ratio_table
from experiments.common.origin import ROOT, commit, save
from pdjax.flags import new_flags, run
from pdjax.workloads.synthetic import poisson

VOCAB = 1000

FLAGS = new_flags()
_ENGINES = flags.DEFINE_multi_integer(
    "engines", [1, 4, 16, 64], "engines of each kind, a size each", flag_values=FLAGS
)
_REQUESTS = flags.DEFINE_multi_integer(
    "requests",
    [300, 400, 640, 1280],
    "requests at each size; the last for all further sizes",
    flag_values=FLAGS,
)
_RATE = flags.DEFINE_float("rate", 10.0, "requests a second and engine", flag_values=FLAGS)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "runs of each build and size", flag_values=FLAGS)
_BASE = flags.DEFINE_string("base", None, "checkout of another build", flag_values=FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "of the arrivals", flag_values=FLAGS)
_PROFILE = flags.DEFINE_bool(
    "profile", False, "run each build and size once under cProfile instead", flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", None, "JSON file for what was measured", flag_values=FLAGS)


def job(engines: int, requests: int, rate: float, seed: int) -> dict[str, Any]:
    """Return the job of both builds at a size: `engines` of each kind, and all requests."""
    arrivals = poisson(rate * engines, requests, (100, 2000), (20, 200), seed)
    prompts = [arrival.request(i, VOCAB).prompt_token_ids for i, arrival in enumerate(arrivals)]
    return {
        "prefill": engines,
        "decode": engines,
        "rows": 64,
        "groups": 4,
        "layout": [32, 8, 128, 64, "bfloat16", 2],
        "token_budget": 2048,
        "max_sequences": 8,
        "max_waiting": 100_000,
        "max_model_len": 4096,
        "prefill_pages": 1 + 16 * 4096 // 64,
        "decode_pages": 1 + 64 * 4096 // 64,
        "vocab_size": VOCAB,
        "prefill_token": 1 / 44_000,
        "tick": 7e-3,
        "write": 50e-6,
        "latency": 10e-6,
        "bandwidth": 300e9,
        "tokens": str(ROOT / "pdjax/sim/tokens.py"),
        "arrivals": [
            [arrival.moment, prompt, arrival.output]
            for arrival, prompt in zip(arrivals, prompts, strict=True)
        ],
    }


def measure(build: str, tree: Path, job: dict[str, Any], profile: Path | None) -> dict[str, Any]:
    """Run a job with a build, in a process of its own whose `pdjax` is that of `tree`.

    Raises:
      RuntimeError: the process has failed, or has used another tree.
    """
    how = ["-m", "cProfile", "-o", str(profile)] if profile else []
    ran = subprocess.run(
        [sys.executable, "-P", *how, str(script_of(tree))],
        input=json.dumps(job),
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise RuntimeError(f"{build}: {ran.stderr.strip()}")
    result = json.loads(ran.stdout)
    if Path(result["source"]) != tree.resolve():
        raise RuntimeError(f"{build}: ran {result['source']}, which is not {tree}")
    return result


def script_of(tree: Path) -> Path:
    """Return the script that runs a job with the build in `tree`: its doors differ before steps
    were data."""
    older = (tree / "pdjax/engine_api.py").is_file()
    return Path(__file__).with_name("older_build.py" if older else "this_build.py")


def rounds(
    builds: dict[str, Path], engines: int, asked: dict[str, Any], count: int
) -> dict[str, list[dict[str, Any]]]:
    """Run every build at one size, in turns; return the runs of each."""
    runs: dict[str, list[dict[str, Any]]] = {build: [] for build in builds}
    for turn in range(count):
        # The order changes, so that a machine that warms up favours neither.
        for build in sorted(builds, reverse=bool(turn % 2)):
            result = measure(build, builds[build], asked, None)
            runs[build].append(result)
            print(f"{engines}+{engines} {build}: {result['cpu_s']:.2f} s", flush=True)
    return runs


def profiles(builds: dict[str, Path], engines: int, asked: dict[str, Any]) -> None:
    """Print where the time goes, by the functions' own times."""
    for build, tree in builds.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "profile"
            measure(build, tree, asked, path)
            print(f"{engines}+{engines} {build}")
            pstats.Stats(str(path)).sort_stats("tottime").print_stats(40)


def main() -> None:
    """Measure and print; see the module."""
    builds = {"new": ROOT} | ({"base": Path(_BASE.value)} if _BASE.value else {})
    sizes, counts = _ENGINES.value or [1], list(_REQUESTS.value or [300])
    counts += [counts[-1]] * (len(sizes) - len(counts))
    found: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for engines, count in zip(sizes, counts, strict=False):
        asked = job(engines, count, _RATE.value or 10.0, _SEED.value or 0)
        if _PROFILE.value:
            profiles(builds, engines, asked)
        else:
            found[engines] = rounds(builds, engines, asked, _ROUNDS.value or 1)
    if not found:
        return
    print(host_table(found), ratio_table(found), latency_table(found), sep="\n\n")
    if _OUT.value:
        save(
            {
                "commit": commit(),
                "base": commit_of(builds.get("base")),
                "command": ["bench_scale", *filter(is_telling, sys.argv[1:])],
                "machine": {
                    "processor": platform.processor() or platform.machine(),
                    "cores": os.cpu_count(),
                    "python": platform.python_version(),
                },
                "sizes": {
                    str(engines): {
                        "runs": {
                            build: [
                                {k: v for k, v in each.items() if k not in LONG} for each in runs
                            ]
                            for build, runs in found[engines].items()
                        },
                        "compared": compared(found[engines]),
                    }
                    for engines in found
                },
            },
            _OUT.value,
        )


def commit_of(tree: Path | None) -> str | None:
    """Return the commit of a tree that `git archive` wrote; None where its files do not say it."""
    if tree is None:
        return None
    for path in ORIGINS:
        if (tree / path).is_file():
            text = (tree / path).read_text("utf-8")
            found = re.search(r'^EXPORTED = "([0-9a-f]{40})"', text, re.MULTILINE)
            return found[1] if found else None
    return None


ORIGINS = ("pdjax/core/origin.py", "experiments/common/origin.py", "experiments/origin.py")
"""The files that hold a build's commit: today's, and those of older builds."""


def is_telling(argument: str) -> bool:
    """Whether an argument says what was measured, and not where this machine keeps it."""
    return not argument.startswith(("--out=", "--base="))


LONG = ("requests", "tokens", "source")
"""Parts of a run that are not saved: they are compared, and differences are saved instead."""


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
