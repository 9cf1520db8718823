"""One run of `bench_scale` with the coordinator of this build, or of another with steps as data.

`bench_scale` runs it as a script, in a process whose `pdjax` is that build. It reads a job as JSON
from stdin, and writes the results as JSON to stdout. `older_build` is for builds before that.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pdjax
from pdjax.config import Config, DecodeConfig, HandoffConfig, KVConfig, PrefillConfig
from pdjax.core.kv_layout import KVLayout
from pdjax.core.request import Request, SamplingParams
from pdjax.sim.cluster import Cluster
from pdjax.sim.costs import StepCosts
from pdjax.sim.links import Link


class Stopwatch:
    """Adds up the time inside functions; one that another calls counts once.

    Args:
      clock: tells seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = 0.0
        self._clock, self._inside = clock, False

    def time(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        @wraps(function)
        def timed(*args: Any) -> Any:
            if self._inside:
                return function(*args)
            self._inside, start = True, self._clock()
            try:
                return function(*args)
            finally:
                self._inside = False
                self.seconds += self._clock() - start

        return timed


def build(job: dict[str, Any]) -> Cluster:
    """Make the cluster that a job describes."""
    layout = KVLayout.of_heads(*job["layout"])
    config = Config(
        kv=KVConfig(page_size=layout.page_size, prefix_cache=False),
        prefill=PrefillConfig(
            engines=job["prefill"],
            pages=job["prefill_pages"],
            token_budget=job["token_budget"],
            max_sequences=job["max_sequences"],
        ),
        decode=DecodeConfig(engines=job["decode"], pages=job["decode_pages"], rows=job["rows"]),
        handoff=HandoffConfig(layer_groups=job["groups"]),
        max_waiting=job["max_waiting"],
        max_recorded=max(1, len(job["arrivals"])),
    )
    return Cluster(
        config,
        layout,
        max_model_len=job["max_model_len"],
        vocab_size=job["vocab_size"],
        costs=StepCosts(prefill_token=job["prefill_token"], tick=job["tick"], write=job["write"]),
        link=Link(bandwidth=job["bandwidth"], latency=job["latency"]),
    )


def drive(job: dict[str, Any]) -> dict[str, Any]:
    """Serve the job's arrivals; return the host's times, latencies and tokens."""
    cluster, simulator = build(job), Stopwatch()
    for engine in cluster.engines.values():
        engine.submit = simulator.time(engine.submit)  # type: ignore[method-assign]
    cluster.transport.send = simulator.time(cluster.transport.send)  # type: ignore[method-assign]
    cluster.transport.write = simulator.time(cluster.transport.write)  # type: ignore[method-assign]
    for i, (moment, prompt, output) in enumerate(job["arrivals"]):
        params = SamplingParams(temperature=0.0, seed=i, max_tokens=output, ignore_eos=True)
        cluster.expect_request(Request(f"r{i}", tuple(prompt), params, moment))
    cpu, wall = time.process_time(), time.perf_counter()
    cluster.serve()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    cluster.coordinator.check()
    run = cluster.so_far()
    return {
        "cpu_s": cpu,
        "wall_s": wall,
        "simulator_s": simulator.seconds,
        "simulated_s": run.seconds,
        "turns": run.turns,
        "events": run.events,
        "requests": [
            [each.id, each.ttft, each.tpot, each.token_times[-1]] for each in run.requests
        ],
        "tokens": {f"{id}#0": choices[0] for id, choices in run.tokens.items()},
        "source": str(Path(pdjax.__file__).resolve().parents[1]),
    }


if __name__ == "__main__":
    json.dump(drive(json.load(sys.stdin)), sys.stdout)
