"""How many tokens a second stream over HTTP, and what does that cost the coordinator?

Engines that take a given time and no device stand behind the real coordinator and session; the real
server is in front of them, and plain sockets in other processes read its streams. Every row has one
stream. Each way is measured at a pace that it should keep up with, and as fast as it can; a ceiling
is the same bytes from a bare asyncio server. All ways see the same load in the same run:

* direct: requests are submitted to the session, their events are dropped. Text is made, as `LLM`
  makes it.
* in one: HTTP in the process of the engines.
* fronts: HTTP in so many processes.

`lag` is the time from the end of a step to the dispatch of the next one: the coordinator's turn and
all that keeps it waiting. `first` is what the first token of a lone request takes beyond a direct
one. CPU is that of the fronts; in one process it is that of the coordinator, too.

Prediction (16 cores): 4,000 chunks a second and front, 12,000 over four, a ceiling four times as
high; less than 1 ms beside a direct first token; a lag with fronts that is at most 1.1 times the
direct one, and in one process twice that.

  python -m experiments.bench_fronts --out=results/fronts.json
"""

import asyncio
import statistics
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
_PACE = flags.DEFINE_float("pace_ms", 40.0, "of a step, at a pace to keep up with", **_OF)
_FAST = flags.DEFINE_float("fast_ms", 1.0, "of a step, as fast as it goes", **_OF)
_FIRSTS = flags.DEFINE_integer("firsts", 200, "requests for the first token", **_OF)
_CLIENTS = flags.DEFINE_integer("clients", 2, "processes that read", **_OF)
_OUT = flags.DEFINE_string("out", "results/fronts.json", "JSON file to write", **_OF)

COLUMNS = {
    "tokens/s": ("tokens_per_s", 0),
    "chunks/s": ("chunks_per_s", 0),
    "tokens a chunk": ("tokens_per_chunk", 2),
    "CPU us a chunk": ("cpu_us_per_chunk", 0),
    "lag us": ("lag_us", 0),
    "p99": ("lag_p99_us", 0),
    "first + ms": ("added_first_ms", 2),
}
"""Of the table: names of what was measured, with the digits that are shown."""


def lag_of(lags: list[float]) -> dict[str, float]:
    """Statistics of lags, microseconds."""
    cut = statistics.quantiles(lags, n=100) if len(lags) > 1 else [0.0] * 99
    return {"lag_us": cut[49] * 1e6, "lag_p99_us": cut[98] * 1e6}


def main() -> None:
    """Run the experiment; see the module."""
    logs.set_up("warning")
    streams, tokens = _STREAMS.value or 1, _TOKENS.value or 1
    readers, firsts = _CLIENTS.value or 1, _FIRSTS.value or 1
    deploy.BACKENDS["paced"] = deployment
    llm = AsyncLLM(config_of(streams), backend="paced", progress=False)
    [decode] = [engine for engine in llm.llm.engines if engine.rows]
    paced: Any = decode
    direct, found = Direct(llm.llm), dict[str, dict[str, Any]]()

    def measured(name: str, call: Any) -> None:
        for pace, milliseconds in (("pace", _PACE.value), ("fast", _FAST.value)):
            paced.start_over((milliseconds or 0.0) / 1e3)
            found[f"{name}, {pace}"] = call() | lag_of(paced.lags)
        paced.start_over(0.0)

    measured("direct", lambda: direct.streams(streams, tokens))
    for count in _FRONTS.value or ():
        name = f"{count} fronts" if count else "in one"
        with serving(llm, count) as port:
            streamed(port, streams, 8, readers)  # the first requests find nothing warm
            pids = processes_of(port)

            def load(port: int = port, pids: list[int] = pids) -> dict[str, float]:
                before = cpu_seconds(pids)
                told = streamed(port, streams, tokens, readers)
                spent = cpu_seconds(pids) - before
                return told | {"cpu_us_per_chunk": spent / told.pop("chunks") * 1e6}

            measured(name, load)
            alone = statistics.median(direct.first_s(firsts))
            [through] = clients("firsts", port, firsts)
            added = statistics.median(through["first_s"]) - alone
            found[f"{name}, pace"]["added_first_ms"] = added * 1e3
        found[f"ceiling, {count or 1}"] = ceiling(count or 1, streams, tokens, readers)
    measured("direct again", lambda: direct.streams(streams, tokens))
    asyncio.run(llm.close())

    rows = [
        [name, *(number(each.get(column), digits) for column, digits in COLUMNS.values())]
        for name, each in found.items()
    ]
    print(table(["way", *COLUMNS], rows))
    asked = {"streams": streams, "tokens": tokens, "clients": readers}
    paces = {"pace_ms": _PACE.value, "fast_ms": _FAST.value}
    save({**origin("uvicorn", "fastapi"), **asked, **paces, "ways": found}, _OUT.value)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
