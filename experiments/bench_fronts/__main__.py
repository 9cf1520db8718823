"""How many tokens a second stream over HTTP, and what does that cost the coordinator?

Engines that take a given time and no device stand behind the real coordinator and session; the real
server is in front of them, and plain sockets in other processes read its streams. Every row has one
stream. Each way is measured at several paces; where it does not keep up, chunks have more tokens. A
ceiling is the same bytes from a bare asyncio server. All ways see the same load in the same run:

* direct: requests are submitted to the session, their events are dropped. Text is made, as `LLM`
  makes it.
* in one: HTTP in the process of the engines.
* fronts: HTTP in so many processes.

`lag` is the time from the end of a step to the dispatch of the next one: the coordinator's turn and
all that keeps it waiting. CPU is that of the fronts; in one process it is that of the coordinator,
too. At the end it is told what the first token of a lone request takes beyond a direct one.

Prediction (16 cores): 4,000 chunks a second and front, 12,000 over four, a ceiling four times as
high; less than 1 ms beside a direct first token; a lag with fronts that is at most 1.1 times the
direct one, and in one process twice that.

  python -m experiments.bench_fronts --out=results/fronts.json
"""

import asyncio
import statistics
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

from absl import flags

from experiments.bench_fronts.engines import config_of, deployment
from experiments.bench_fronts.ways import (
    Direct,
    ceiling,
    clients,
    cpu_seconds,
    processes_of,
    serving,
    streamed,
)
from experiments.common.origin import origin, save
from experiments.common.tables import number, table
from pdjax import deploy
from pdjax.async_llm import AsyncLLM
from pdjax.flags import new_flags, run
from pdjax.serving import logs

FLAGS = new_flags()
_OF: dict[str, Any] = {"flag_values": FLAGS}
_FRONTS = flags.DEFINE_multi_integer(
    "fronts", [0, 1, 2, 4], "processes of HTTP, 0 is in the engines' one; may be repeated", **_OF
)
_STREAMS = flags.DEFINE_integer("streams", 64, "rows, each with a stream", **_OF)
_TOKENS = flags.DEFINE_integer("tokens", 512, "tokens of a stream", **_OF)
_STEPS = flags.DEFINE_multi_float(
    "step_ms", [40.0, 10.0, 4.0], "of a decode step: how fast tokens come; may be repeated", **_OF
)
_FIRSTS = flags.DEFINE_integer("firsts", 200, "requests for the first token", **_OF)
_CLIENTS = flags.DEFINE_integer("clients", 2, "processes that read", **_OF)
_OUT = flags.DEFINE_string("out", "results/fronts.json", "JSON file to write", **_OF)

COLUMNS = {
    "offered": ("offered_per_s", 0),
    "tokens/s": ("tokens_per_s", 0),
    "chunks/s": ("chunks_per_s", 0),
    "tokens a chunk": ("tokens_per_chunk", 2),
    "CPU us a chunk": ("cpu_us_per_chunk", 0),
    "lag us": ("lag_us", 0),
    "p99": ("lag_p99_us", 0),
}
"""Of the table: names of what was measured, with the digits that are shown."""


def lag_of(lags: list[float]) -> dict[str, float]:
    """Statistics of lags, microseconds."""
    cut = statistics.quantiles(lags, n=100) if len(lags) > 1 else [0.0] * 99
    return {"lag_us": cut[49] * 1e6, "lag_p99_us": cut[98] * 1e6}


class Bench:
    """One run.

    Args:
      streams, tokens, readers: as the flags say.
      steps: milliseconds of a step.

    Attributes:
      llm: the model, without a device.
      rows: what was measured, of each way at each pace.
    """

    def __init__(self, streams: int, tokens: int, readers: int, steps: Seq[float]) -> None:
        deploy.BACKENDS["paced"] = deployment
        self.llm = AsyncLLM(config_of(streams), backend="paced", progress=False)
        self.rows: list[dict[str, Any]] = []
        self._streams, self._tokens, self._readers = streams, tokens, readers
        self._steps, self._direct = steps, Direct(self.llm.llm)
        [self._engine] = [engine for engine in self.llm.llm.deployment.backing if engine.rows]

    def direct(self, name: str) -> None:
        """Measure the session without HTTP."""
        self._at_each_pace(name, lambda: self._direct.streams(self._streams, self._tokens))

    def http(self, name: str, count: int, firsts: int) -> float:
        """Measure HTTP in so many processes; the milliseconds that it adds to the first token."""
        with serving(self.llm, count) as port:
            self._streamed(port, 8)  # the first requests find nothing warm
            pids = processes_of(port)

            def load() -> dict[str, float]:
                before = cpu_seconds(pids)
                told = self._streamed(port, self._tokens)
                spent = cpu_seconds(pids) - before
                return told | {"cpu_us_per_chunk": spent / told.pop("chunks") * 1e6}

            self._at_each_pace(name, load)
            alone = statistics.median(self._direct.first_s(firsts))
            [through] = clients("firsts", port, firsts)
            return (statistics.median(through["first_s"]) - alone) * 1e3

    def ceiling(self, name: str, processes: int) -> None:
        """Measure the same bytes from bare servers."""
        told = ceiling(processes, self._streams, self._tokens, self._readers)
        self.rows.append({"way": name} | told)

    def _streamed(self, port: int, tokens: int) -> dict[str, float]:
        return streamed(port, self._streams, tokens, self._readers)

    def _at_each_pace(self, name: str, call: Callable[[], dict[str, float]]) -> None:
        for milliseconds in self._steps:
            self._engine.start_over(milliseconds / 1e3)
            told = call() | lag_of(self._engine.lags)
            offered = {"step_ms": milliseconds, "offered_per_s": self._streams / milliseconds * 1e3}
            self.rows.append({"way": name} | offered | told)
        self._engine.start_over(0.0)


def main() -> None:
    """Run the experiment; see the module."""
    logs.set_up("warning")
    streams, tokens, readers = _STREAMS.value or 1, _TOKENS.value or 1, _CLIENTS.value or 1
    bench, added = Bench(streams, tokens, readers, _STEPS.value or ()), dict[str, float]()
    bench.direct("direct")
    for count in _FRONTS.value or ():
        name = f"{count} fronts" if count else "in one"
        added[name] = bench.http(name, count, _FIRSTS.value or 1)
        bench.ceiling(f"ceiling, {count or 1}", count or 1)
    bench.direct("direct again")
    asyncio.run(bench.llm.close())
    rows = [
        [row["way"], *(number(row.get(column), digits) for column, digits in COLUMNS.values())]
        for row in bench.rows
    ]
    print(table(["way", *COLUMNS], rows))
    for name, milliseconds in added.items():
        print(f"{name}: adds {milliseconds:.2f} ms to the first token")
    asked = {"streams": streams, "tokens": tokens, "clients": readers}
    found = {"added_first_ms": added, "ways": bench.rows}
    save({**origin("uvicorn", "fastapi"), **asked, **found}, _OUT.value)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
