"""The host's time of a decode step with many requests waiting, on simulated engines."""

import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiments.bench_scale.this_build import Stopwatch
from experiments.common.tables import number, table
from pdjax.config import Config, DecodeConfig, KVConfig, PoliciesConfig, PrefillConfig
from pdjax.core.ids import EngineId
from pdjax.core.request import Request, SamplingParams
from pdjax.core.slo import SLO
from pdjax.host.metrics.observer import Observer
from pdjax.interfaces.steps import StepKind
from pdjax.sim.cluster import Cluster
from pdjax.sim.costs import StepCosts

_PAGE = 64
_TENANTS = 16


@dataclass(frozen=True)
class Situation:
    """What the host has to do.

    Attributes:
      engines: of each kind. `rows`: of each that decodes.
      waiting: requests in the queue, all the time.
      prompt: tokens of a prompt. `output`: of an answer, in the mean; from half to 1.5 times that.
      policies: of the coordinator.
      prefix_cache: whether it keeps prefixes, of which no prompt has one that another had.
    """

    engines: int
    rows: int
    waiting: int
    prompt: int
    output: int
    policies: PoliciesConfig = field(default_factory=PoliciesConfig)
    prefix_cache: bool = True


class Ticks(Observer):
    """Counts the ticks that have come back."""

    def __init__(self) -> None:
        self.count = 0

    def step_done(
        self, engine: EngineId, kind: StepKind, tokens: int, rows: int, start: float, end: float
    ) -> None:
        self.count += kind is not StepKind.PREFILL


class Load:
    """A cluster of which every row decodes while a number of requests waits: for each that begins
    another one comes, or where none is to wait, for each that ends.

    A request has a class of priority, a tenant, a deadline and an SLO, all drawn, so that any
    policy has something to go by; the deadline and the SLO are so late that none is refused.
    """

    def __init__(self, situation: Situation, seed: int = 0) -> None:
        self.situation, self._chance = situation, random.Random(seed)
        longest = situation.prompt + 2 * situation.output
        config = Config(
            kv=KVConfig(page_size=_PAGE, prefix_cache=situation.prefix_cache),
            prefill=PrefillConfig(engines=situation.engines),
            decode=DecodeConfig(
                engines=situation.engines,
                rows=situation.rows,
                pages=1 + situation.rows * (longest // _PAGE + 2),  # one more in hand of each
            ),
            policies=situation.policies,
            max_waiting=situation.waiting + situation.engines * situation.rows + 1,
            max_recorded=1000,
        )
        self.cluster = Cluster(config, max_model_len=longest, costs=StepCosts(tick=0.01))
        self._simulator = Stopwatch(time.thread_time)
        for owner, name in (
            *((engine, "submit") for engine in self.cluster.engines.values()),
            *((self.cluster.transport, name) for name in ("send", "write")),
        ):
            setattr(owner, name, self._simulator.time(getattr(owner, name)))
        self._ticks = self.cluster.coordinator.observer = Ticks()
        self._asked = self._live = 0
        self._spent = 0.0

    @property
    def decoding(self) -> int:
        """Rows that decode."""
        return sum(len(each.decoding) for each in self.cluster.coordinator.loop.fleet)

    def _request(self) -> Request:
        situation, chance = self.situation, self._chance
        output = round(situation.output * chance.uniform(0.5, 1.5))
        if self._asked < situation.engines * situation.rows:  # so that rows do not end together
            output = 1 + round(output * chance.random())
        self._asked += 1
        params = SamplingParams(
            temperature=0.0, seed=self._asked, max_tokens=output, ignore_eos=True
        )
        prompt = (1 + self._asked % 997, 1 + self._asked // 997, *[1] * (situation.prompt - 2))
        return Request(
            f"r{self._asked}",
            prompt,
            params,
            self.cluster.clock.now(),
            priority=chance.randint(-5, 5),
            deadline=chance.uniform(1e5, 1e6),
            slo=SLO(ttft=1e5, tpot=10.0),
            labels={"tenant": str(chance.randrange(_TENANTS))},
        )

    def turn(self) -> list[float]:
        """Let requests come for those that have ended, and go once around. Returns the host's time
        of each tick that has come back, seconds of processor: that of all turns since the last such
        turn, divided among them."""
        situation, coordinator = self.situation, self.cluster.coordinator
        queued = len(coordinator.loop.lifecycle.waiting)
        free = situation.engines * situation.rows - self._live
        missing = max(0, free, situation.waiting - queued)
        requests = [self._request() for _ in range(missing)]
        self._live += missing
        before, simulated = self._ticks.count, self._simulator.seconds
        start = time.thread_time()
        for request in requests:
            coordinator.submit(request)
        news = coordinator.step()
        spent = time.thread_time() - start
        self._live -= sum(progress.finished for progress in news)
        self._spent += spent - (self._simulator.seconds - simulated)
        ticks = self._ticks.count - before
        if not ticks:
            return []
        each, self._spent = self._spent / ticks, 0.0
        return [each] * ticks

    def fill(self) -> None:
        """Go on until nearly every row decodes."""
        while self.decoding < 0.97 * self.situation.engines * self.situation.rows:
            self.turn()


def measure(situation: Situation, steps: int, runs: int, seed: int = 0) -> dict[str, Any]:
    """Return the host's times of so many decode steps, in milliseconds of processor.

    Each of several runs does the same, turn for turn. Of each step the least time counts: so most
    of what other programs cost it is left out, and what the host itself does now and then, as
    its garbage collection, is not.
    """
    found = []
    for _ in range(runs):
        load = Load(situation, seed)
        load.fill()
        times, before = list[float](), load.cluster.recorder.output_tokens
        while len(times) < steps:
            times += load.turn()
        tokens = load.cluster.recorder.output_tokens - before
        found.append(times)
    times = np.min(found, axis=0).tolist()
    p50, p90, p99 = (float(p) * 1e3 for p in np.percentile(times, (50, 90, 99)))
    return {
        "waiting": situation.waiting,
        "steps": len(times),
        "rows": tokens / len(times),
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "max_ms": max(times) * 1e3,
        "mean_ms": float(np.mean(times)) * 1e3,
    }


def waiting_table(found: Iterable[Mapping[str, Any]]) -> str:
    """Make a table of what was measured at each depth of the queue."""
    names = ("p50_ms", "p90_ms", "p99_ms", "max_ms", "mean_ms")
    rows = [
        [
            number(each["waiting"], 0),
            number(each["rows"], 0),
            *(number(each[name], 2) for name in names),
        ]
        for each in found
    ]
    return table(["waiting", "rows", "host, ms/step p50", "p90", "p99", "max", "mean"], rows)
