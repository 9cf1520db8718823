"""Does a server hold anything for clients that have gone?

`pdjax serve` runs in a process of its own. Clients come in waves of --wave requests, --crowd at
once; a third of them do not take their answer: they leave before the first token, in mid-stream or
within their body, half-close their socket, or never read. After each wave the server comes to rest,
and is looked at from outside: pages, rows, sequences and open answers (`/engines`), descriptors,
threads and resident memory (`/proc`).

Predicted before the first run: after each wave nothing is held, there are no more descriptors than
before the first and no more threads than after it, and memory grows by less than 2% from the first
wave to the last.

  python -m experiments.storm
  python -m experiments.storm --serve=--front_processes=2
  python -m experiments.storm --config=configs/smollm2_cpu.py --vocab=49152 --requests=240 --wave=60

Exit status 1 where a prediction was wrong. Linux only.
"""

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

from absl import flags

from experiments.common.origin import origin, save
from experiments.common.tables import number, table
from experiments.storm.clients import Target, drawn, storm
from experiments.storm.server import Watched, serving
from pdjax.flags import new_flags, run

FLAGS = new_flags()
_CONFIG = flags.DEFINE_string(
    "config", "experiments/storm/config.py", "preset or config file", flag_values=FLAGS
)
_SERVE = flags.DEFINE_multi_string(
    "serve", [], "a further flag of pdjax serve, as in --serve=--stall_s=5", flag_values=FLAGS
)
_REQUESTS = flags.DEFINE_integer("requests", 2000, "clients in all", flag_values=FLAGS)
_WAVE = flags.DEFINE_integer("wave", 500, "clients between two looks", flag_values=FLAGS)
_CROWD = flags.DEFINE_integer("crowd", 32, "clients at once", flag_values=FLAGS)
_PROMPT = flags.DEFINE_integer("prompt", 100, "most tokens of a prompt", flag_values=FLAGS)
_OUTPUT = flags.DEFINE_integer("output", 60, "most tokens of an answer", flag_values=FLAGS)
_VOCAB = flags.DEFINE_integer("vocab", 101, "token ids are below it", flag_values=FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the clients", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "results/storm.json", "file to write", flag_values=FLAGS)

SEEN = ("pages", "rows", "sequences", "answers", "descriptors", "threads", "resident_mb")
"""What is looked at."""


def look(server: Watched, descriptors: int | None) -> dict[str, Any]:
    """The server, once it is at rest or patience ends."""
    held = server.rest(descriptors)
    return held | {"threads": server.threads, "resident_mb": round(server.resident / 1e6, 1)}


def waves(server: Watched, target: Target) -> list[dict[str, Any]]:
    """The server before the storm and after each wave, and what became of the clients."""
    seen: list[dict[str, Any]] = [{"clients": 0, **look(server, None)}]
    done, total = 0, _REQUESTS.value or 0
    while done < total:
        count = min(_WAVE.value or total, total - done)
        kinds, begun = drawn(count, (_SEED.value or 0) + done), time.monotonic()
        outcomes = asyncio.run(storm(target, kinds, _CROWD.value or 1, (_SEED.value or 0) + done))
        done += count
        point = {"clients": done, "seconds": round(time.monotonic() - begun, 1)}
        seen.append(point | look(server, seen[0]["descriptors"]) | {"outcomes": dict(outcomes)})
    return seen


def outcome(seen: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether each prediction holds."""
    before, *after = seen
    first, last = after[0], after[-1]
    held = ("pages", "rows", "steps", "sequences", "answers")
    return {
        "nothing is held": not any(point[name] for point in after for name in held),
        "no descriptor is left": all(p["descriptors"] <= before["descriptors"] for p in after),
        "no thread is left": last["threads"] <= first["threads"],
        "memory is flat": last["resident_mb"] <= 1.02 * first["resident_mb"],
    }


def show(seen: list[dict[str, Any]]) -> str:
    """Make the tables."""
    rows = [[str(p["clients"]), *(number(p[name], 0) for name in SEEN)] for p in seen]
    outcomes: Counter[str] = sum((Counter(p.get("outcomes", {})) for p in seen), Counter())
    what = [[name, str(count)] for name, count in sorted(outcomes.items())]
    heads = ["after clients", *(name.replace("_", ", ") for name in SEEN)]
    return table(heads, rows) + "\n\n" + table(["kind: outcome", "clients"], what)


def main() -> int:
    """Run the storm, print, save; return 1 where something was left."""
    log = Path("results/storm.log")
    log.parent.mkdir(exist_ok=True)
    with serving([f"--config={_CONFIG.value}", *(_SERVE.value or ())], log) as server:
        sizes = _VOCAB.value or 0, _PROMPT.value or 0, _OUTPUT.value or 0
        seen = waves(server, Target(server.host, server.port, *sizes))
    held = outcome(seen)
    print(show(seen))
    print("\n".join(f"predicted: {what}: {'right' if held[what] else 'WRONG'}" for what in held))
    save(origin() | {"config": _CONFIG.value, "seen": seen, "predicted": held}, _OUT.value)
    return int(not all(held.values()))


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
