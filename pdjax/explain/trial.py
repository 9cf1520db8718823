"""A mode that serves a workload in the simulation, and what came of it."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

from pdjax.bench.record import Played, named
from pdjax.config import RANDOM, USUAL_FRACTION, Config
from pdjax.core.model_spec import ModelSpec
from pdjax.core.slo import SLO
from pdjax.explain.load import Load
from pdjax.explain.modes import Variant
from pdjax.host.metrics.capacity import Point
from pdjax.host.metrics.summary import summarize
from pdjax.sim.calibration import Calibration
from pdjax.workloads.arrival import Arrival

SHOWN = tuple(
    f"{statistic}_{metric}_ms"
    for metric in ("ttft", "tpot", "itl")
    for statistic in ("median", "p90", "p99")
)
"""The statistics of a trial, as `definitions.py` defines them."""


@dataclass(frozen=True)
class Scale:
    """What the bounds of an SLO are multiplied by: those on the first token, and all others."""

    ttft: float = 1.0
    tpot: float = 1.0

    def of(self, slo: SLO) -> SLO:
        """The bounds, scaled."""
        return SLO(
            ttft=_times(slo.ttft, self.ttft),
            tpot=_times(slo.tpot, self.tpot),
            itl=_times(slo.itl, self.tpot),
            e2el=_times(slo.e2el, self.tpot),
        )


def _times(bound: float | None, factor: float) -> float | None:
    return None if bound is None else bound * factor


@dataclass(frozen=True)
class Outcome:
    """What became of a request: its latencies, in seconds, and the SLO that it is held against.

    Attributes:
      completed: whether it ran to its proper end. shed: whether it was refused for want of room.
      ttft, tpot, e2e: as in RequestMetrics. worst_gap: the longest of `itl`.
      queue: seconds from arrival to its first chunk.
      slo: its own, or else that of the workload.
    """

    completed: bool
    ttft: float | None
    tpot: float | None
    e2e: float | None
    worst_gap: float | None
    queue: float | None
    slo: SLO
    shed: bool = False

    @property
    def itl(self) -> tuple[float, ...]:
        """The gap that a bound on all of them is held against."""
        return () if self.worst_gap is None else (self.worst_gap,)

    def good(self, scale: Scale = Scale()) -> bool:
        """Whether it completed within its bounds, times `scale`."""
        return self.completed and scale.of(self.slo).met_by(self)

    def reached(self) -> list[tuple[float | None, float]]:
        """Each latency that has a bound, and the bound."""
        pairs = (
            (self.ttft, self.slo.ttft),
            (self.tpot, self.slo.tpot),
            (self.worst_gap, self.slo.itl),
            (self.e2e, self.slo.e2el),
        )
        return [(value, most) for value, most in pairs if most is not None]

    def late(self) -> bool:
        """Whether it was served, and its first token came too late."""
        most = self.slo.ttft
        return self.completed and most is not None and self.ttft is not None and self.ttft > most


@dataclass(frozen=True)
class Trial:
    """A run of a mode at a rate.

    Attributes:
      mode: what served.
      rate: requests a second that were offered.
      numbers: counts and statistics by the keys of `definitions.RUN`, those of `SHOWN` among them.
      outcomes: of each request that was not aborted.
      load: what the engines and the links did.
    """

    mode: Variant
    rate: float
    numbers: dict[str, Any]
    outcomes: tuple[Outcome, ...]
    load: Load

    def point(self, scale: Scale = Scale()) -> Point:
        """Good requests and all of them, under an SLO times `scale`."""
        good = sum(outcome.good(scale) for outcome in self.outcomes)
        return Point(self.rate, good, len(self.outcomes))

    @property
    def attainment(self) -> float:
        """Good requests, of all."""
        _, good, total = self.point()
        return good / total if total else 0.0

    @property
    def lives(self) -> float:
        """How often the mean life of a request goes into the time in which requests came: of few,
        the engines were hardly ever as full as they would be."""
        lives = [each.e2e for each in self.outcomes if each.e2e is not None]
        return len(self.outcomes) / self.rate / (sum(lives) / len(lives)) if lives else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        _, good, total = self.point()
        return {
            "mode": self.mode.name,
            "request_rate": self.rate,
            "slo_good": good,
            "slo_total": total,
            "slo_attainment": good / total if total else None,
            **self.numbers,
            "load": self.load.to_json(),
        }


KEPT = ("completed", "failed", "shed", "duration", "request_throughput", "output_throughput")
"""Counts of a run that a trial keeps."""


class Simulator:
    """Runs modes on simulated chips.

    Args:
      calibration: of the chips and of the link between two.
      spec: of the model.
      slo: what makes a request good that has no bounds of its own.
      longest: tokens of prompt and output together.

    Raises:
      ValueError: a calibration without a link.
    """

    def __init__(self, calibration: Calibration, spec: ModelSpec, slo: SLO, longest: int) -> None:
        if calibration.link is None:
            raise ValueError(
                f"costs={calibration.name}: does not say what the link between two chips can do; "
                "give --link_gb_s"
            )
        self._calibration, self._spec = calibration, spec
        self._slo, self.longest = slo, longest

    def config(self, config: Config) -> Config:
        """The config with the calibration's model, pools of the chips' memory, and room for the
        requests.

        Raises:
          ValueError: memory that is too small for one whole context.
        """
        model = replace(config.model, source=RANDOM, spec=self._spec, max_model_len=self.longest)
        prefill, decode = config.prefill, config.decode
        contexts = prefill.max_sequences * (1 + prefill.lookahead)
        pages = prefill.pages or self._pages(config, contexts)
        # A flexible engine's pool has the pages of both sections.
        taken = 0 if config.flexible == "none" else pages or 0
        return replace(
            config,
            model=model,
            prefill=replace(prefill, pages=pages),
            decode=replace(decode, pages=decode.pages or self._pages(config, decode.rows, taken)),
        )

    def _pages(self, config: Config, contexts: int, taken: int = 0) -> int | None:
        """Pages for so many whole contexts, or as many as a chip's memory holds beside those that
        are taken; None where that is not known, so that there are enough."""
        size = config.kv.page_size
        room = self._calibration.pages(size, config.kv.memory_fraction or USUAL_FRACTION)
        room = None if room is None else room - taken
        each = -(-self.longest // size)
        if room is not None and room < 1 + each:
            raise ValueError(
                f"model.max_model_len={self.longest}: takes {each} pages, but a chip has room for "
                f"{room}"
            )
        return None if room is None else min(room, 1 + contexts * each)

    def run(self, mode: Variant, rate: float, arrivals: Seq[Arrival]) -> Trial:
        """Serve a workload, whose requests come at a rate."""
        from pdjax.bench import simulated

        # Ten spans are kept for each request that is, and there are no more ticks than tokens.
        room = len(arrivals) + sum(each.output for each in arrivals) // 5
        most = max(mode.config.max_recorded, room)
        config = replace(self.config(mode.config), max_recorded=most)
        costs, link = self._calibration.costs, self._calibration.link
        cluster, _ = simulated.cluster_of(config, costs, link)
        played = simulated.play(cluster, named(self._asking(arrivals), "r"))
        outcomes = tuple(self._outcomes(played))
        numbers = summarize([record.metrics for record in played.records])
        kept = {key: numbers[key] for key in (*KEPT, *SHOWN)}
        return Trial(mode, rate, kept, outcomes, Load.of(cluster, played))

    def _asking(self, arrivals: Seq[Arrival]) -> list[Arrival]:
        """The requests, which ask for their SLO: some policies go by it. What it says of gaps and
        of whole answers, no request can ask for."""
        asked = SLO(ttft=self._slo.ttft, tpot=self._slo.tpot)
        if asked == SLO():
            return list(arrivals)
        return [each if each.slo else replace(each, slo=asked) for each in arrivals]

    def _outcomes(self, played: Played) -> list[Outcome]:
        found = []
        for record in played.records:
            metrics, slo = record.metrics, record.slo(self._slo)
            if slo is not None and (metrics.completed or metrics.failed or metrics.shed):
                gap = max(metrics.itl, default=None)
                times = metrics.ttft, metrics.tpot, metrics.e2e, gap, metrics.queue
                found.append(Outcome(metrics.completed, *times, slo, metrics.shed))
        return found
