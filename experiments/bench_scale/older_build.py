"""One run of `bench_scale` with the coordinator of an older build, which knows neither steps as
data nor events: commit 4991243 and those near it.

`bench_scale` runs it as a script, in a process whose `pdjax` is that build. It reads a job as JSON
from stdin, and writes the results as JSON to stdout. The older build is imported by name at run
time, since its modules have moved since.
"""

import heapq
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

door: Any = importlib.import_module("pdjax.engine_api")
layouts: Any = importlib.import_module("pdjax.kv_layout")
requests: Any = importlib.import_module("pdjax.request")
configs: Any = importlib.import_module("pdjax.config")
coordinators: Any = importlib.import_module("pdjax.host.coordinator")
recorders: Any = importlib.import_module("pdjax.host.metrics")


def load_tokens(path: str) -> Any:
    """Load this build's `sim/tokens.py`, which needs nothing but numpy."""
    spec = importlib.util.spec_from_file_location("scale_tokens", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Simulator:
    """The processor seconds that simulating takes, apart from the coordinator's."""

    def __init__(self) -> None:
        self.seconds = 0.0


class HeapClock:
    """A virtual clock with a heap of moments. The build's own keeps a list, which with many engines
    would cost more than the coordinator."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.moment = 0.0
        self.moments: list[float] = []

    def now(self) -> float:
        return self.moment

    def wake_at(self, moment: float) -> None:
        heapq.heappush(self.moments, moment)

    def idle(self, turns: int = 1) -> None:
        start = time.perf_counter()
        while self.moments and self.moments[0] <= self.moment:
            heapq.heappop(self.moments)
        assert self.moments, "nothing is to come"
        self.moment = self.moments[0]
        self.simulator.seconds += time.perf_counter() - start


class Mesh:
    """A mesh, whose work runs in order."""

    def __init__(self, clock: HeapClock) -> None:
        self.clock, self.free = clock, 0.0

    def take(self, seconds: float) -> float:
        self.free = max(self.free, self.clock.now()) + seconds
        self.clock.wake_at(self.free)
        return self.free


class SimTicket:
    """A ticket that is ready at a moment."""

    def __init__(
        self, clock: HeapClock, at: float, value: Any, shipment: Any = None, read_at: float = 0.0
    ) -> None:
        self.clock, self.at, self.value = clock, at, value
        self.shipment, self.read_at = shipment, read_at

    def ready(self) -> bool:
        return self.clock.now() >= self.at

    def gathered(self) -> bool:
        return self.clock.now() >= self.read_at

    def result(self) -> Any:
        assert self.ready(), "the coordinator waits for nothing"
        return self.value


class SimEngine:
    """An engine of either kind, with the costs and tokens of `pdjax/sim`."""

    def __init__(self, job: dict[str, Any], clock: HeapClock, layout: Any, pages: int) -> None:
        self.layout, self.num_pages = layout, pages
        self.layer_groups = layouts.split_groups(layout.num_layers, job["groups"])
        self.mesh, self.simulator = Mesh(clock), clock.simulator
        self.job, self.token_at = job, job["tokens"].token_at

    def prefill(self, batch: Any, after_group: Callable[[int], None] | None = None) -> SimTicket:
        start = time.perf_counter()
        seconds = int(batch.cu_q_lens[-1]) * self.job["prefill_token"]
        at = 0.0
        for index, group in enumerate(self.layer_groups):
            at = self.mesh.take(seconds * len(group) / self.layout.num_layers)
            if after_group is not None:
                self.simulator.seconds += time.perf_counter() - start
                after_group(index)
                start = time.perf_counter()
        ticket = self.sampled(at, batch.sampling.seed, batch.kv_lens)
        self.simulator.seconds += time.perf_counter() - start
        return ticket

    def tick(self, batch: Any) -> SimTicket:
        start = time.perf_counter()
        at = self.mesh.take(self.job["tick"])
        ticket = self.sampled(at, batch.sampling.seed, batch.positions[-1] + 1)
        self.simulator.seconds += time.perf_counter() - start
        return ticket

    def sampled(self, at: float, seed: np.ndarray, position: np.ndarray) -> SimTicket:
        tokens = self.token_at(seed, position, self.job["vocab_size"])
        rows = len(tokens)
        rest = np.zeros(rows, np.float32), np.zeros((rows, 0), np.int32)
        value = door.Sampled(tokens, *rest, np.zeros((rows, 0), np.float32))
        return SimTicket(self.mesh.clock, at, value)

    def remember(self, row: int, token_ids: Any) -> None:
        """No token depends on a history."""


class SimTransfer:
    """A transport with a link for each pair of pools, as in `pdjax/sim`."""

    def __init__(self, job: dict[str, Any], clock: HeapClock, engines: dict[Any, Any]) -> None:
        self.job, self.clock, self.engines = job, clock, engines
        self.wires: dict[Any, float] = {}

    def engine(self, end: Any) -> SimEngine:
        return self.engines[end.side][end.engine]

    def shares_pool(self, source: Any, target: Any) -> bool:
        return False

    def send(self, shipment: Any) -> SimTicket:
        start = time.perf_counter()
        source = self.engine(shipment.source)
        read, layers, layout = source.mesh.take(0.0), len(shipment.layers), source.layout
        nbytes = len(shipment.source_pages) * layout.page_bytes * layers // layout.num_layers
        key = shipment.source, shipment.target
        free = max(self.wires.get(key, 0.0), read, self.clock.now())
        at = self.wires[key] = free + (self.job["latency"] + nbytes / self.job["bandwidth"])
        self.clock.wake_at(at)
        cost = door.TransferCost(nbytes, shipment.pages * layers, 1, 1, 0)
        ticket = SimTicket(self.clock, at, cost, shipment, read)
        self.clock.simulator.seconds += time.perf_counter() - start
        return ticket

    def land(self, ticket: SimTicket, pages: Any) -> SimTicket:
        start = time.perf_counter()
        at = self.engine(ticket.shipment.target).mesh.take(self.job["write"])
        self.clock.simulator.seconds += time.perf_counter() - start
        return SimTicket(self.clock, at, 0)

    def probe(self, source: Any, target: Any, nbytes: int) -> float:
        return self.job["latency"] + nbytes / self.job["bandwidth"]


def build(job: dict[str, Any], clock: HeapClock) -> tuple[Any, Any]:
    """Make the older build's coordinator and recorder."""
    layout = layouts.KVLayout(*job["layout"])
    pages = {kind: job[f"{kind}_pages"] for kind in ("prefill", "decode")}
    prefill, decode = (
        [SimEngine(job, clock, layout, pages[kind]) for _ in range(job[kind])]
        for kind in ("prefill", "decode")
    )
    config = configs.Config(
        kv=configs.KVConfig(page_size=layout.page_size),
        prefill=configs.PrefillConfig(
            engines=job["prefill"],
            token_budget=job["token_budget"],
            max_sequences=job["max_sequences"],
        ),
        decode=configs.DecodeConfig(engines=job["decode"], rows=job["rows"]),
        handoff=configs.HandoffConfig(layer_groups=job["groups"]),
        max_waiting=job["max_waiting"],
    )
    recorder = recorders.Recorder(clock)
    engines = {door.Side.PREFILL: prefill, door.Side.DECODE: decode}
    coordinator = coordinators.Coordinator(
        config,
        vocab_size=job["vocab_size"],
        max_model_len=job["max_model_len"],
        end_token_ids=(),
        prefill_engines=prefill,
        decode_engines=decode,
        transfer=SimTransfer(job, clock, engines),
        clock=clock,
        recorder=recorder,
    )
    return coordinator, recorder


def drive(job: dict[str, Any]) -> dict[str, Any]:
    """Serve the job's arrivals; return the host's times, latencies and tokens."""
    clock = HeapClock(Simulator())
    coordinator, recorder = build(job, clock)
    asked = [
        requests.Request(
            f"r{i}",
            tuple(prompt),
            requests.SamplingParams(temperature=0.0, seed=i, max_tokens=output, ignore_eos=True),
            moment,
        )
        for i, (moment, prompt, output) in enumerate(job["arrivals"])
    ]
    for request in asked:
        clock.wake_at(request.arrival)
    sequences, turns, next_up = [], 0, 0
    cpu, wall = time.process_time(), time.perf_counter()
    while next_up < len(asked) or coordinator.has_work:
        while next_up < len(asked) and asked[next_up].arrival <= clock.now():
            sequences += coordinator.submit(asked[next_up])
            next_up += 1
        coordinator.step()
        turns += 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    coordinator.check()
    return {
        "cpu_s": cpu,
        "wall_s": wall,
        "simulator_s": clock.simulator.seconds,
        "simulated_s": clock.now(),
        "turns": turns,
        "events": None,
        "requests": [
            [each.id, each.ttft, each.tpot, each.token_times[-1]] for each in recorder.requests()
        ],
        "tokens": {each.id: each.output for each in sequences},
        "source": str(Path(door.__file__).resolve().parents[1]),
    }


if __name__ == "__main__":
    job = json.load(sys.stdin)
    job["tokens"] = load_tokens(job["tokens"])
    json.dump(drive(job), sys.stdout)
