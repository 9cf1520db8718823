"""Does an LLM survive what its users do to it?

A small model with random weights in float32, with prefill on one device and decode in two stages on
two others, answers the same prompts greedily all the time. Its undisturbed answers are the truth.

  signals    --llms LLMs get one SIGINT each, at a random moment of `generate`
  lines      --lines calls of `generate` end by an interrupt that a random line of pdjax/host
             raises, where no signal is held back
  losses     --losses calls of a device fail after the pool was donated to them
  threads    --threads threads call `generate`, --requests times each, on one LLM

  python -m experiments.hostile --llms=20 --lines=400 --losses=40 --threads=20 --requests=20

After each of them the LLM must answer the prompts as before, and every page and row must be free or
held by a known sequence. Prints a table; exit status 1 where something was wrong.
"""

import random
import time
from collections.abc import Callable

from absl import flags

from experiments.common.origin import origin, save
from experiments.common.tables import table
from experiments.hostile.faults import CONFIG, answers, lines, losses, signals, threads
from pdjax import LLM
from pdjax.flags import new_flags, run

FLAGS = new_flags()
_LLMS = flags.DEFINE_integer("llms", 20, "LLMs that get a SIGINT each", flag_values=FLAGS)
_LINES = flags.DEFINE_integer("lines", 400, "lines of the host that raise", flag_values=FLAGS)
_LOSSES = flags.DEFINE_integer("losses", 40, "calls of a device that fail", flag_values=FLAGS)
_THREADS = flags.DEFINE_integer(
    "threads", 20, "threads that call generate at once", flag_values=FLAGS
)
_REQUESTS = flags.DEFINE_integer(
    "requests", 20, "requests of a thread, in sequence", flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", "results/hostile.json", "file to write", flag_values=FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "seed of everything random", flag_values=FLAGS)


def main() -> int:
    """Run all, print the table; return 1 where something was wrong."""
    draw = random.Random(_SEED.value)
    rows, runs = [], {}
    with LLM(CONFIG) as llm:
        truth = answers(llm)
        todo: dict[str, tuple[int, Callable[[], tuple[int, int]]]] = {
            "signals": (_LLMS.value, lambda: signals(_LLMS.value, truth, draw)),
            "lines": (_LINES.value, lambda: lines(llm, _LINES.value, truth, draw)),
            "losses": (_LOSSES.value, lambda: losses(llm, _LOSSES.value, truth)),
            "threads": (
                _THREADS.value * _REQUESTS.value,
                lambda: threads(llm, _THREADS.value, _REQUESTS.value, truth),
            ),
        }
        for name, (tried, call) in todo.items():
            begun = time.perf_counter()
            happened, right = call()
            seconds = time.perf_counter() - begun
            runs[name] = {"tried": tried, "happened": happened, "right": right}
            rows.append([name, str(tried), str(happened), str(right), f"{seconds:.0f}"])
    print(table(["what", "tried", "happened", "right afterwards", "seconds"], rows))
    save(origin() | {"seed": _SEED.value, "runs": runs}, _OUT.value)
    return int(any(run["right"] != run["tried"] for run in runs.values()))


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
