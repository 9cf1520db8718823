"""What experiments share that play workloads to modes: how large they are, what is driven, and the
numbers of a run. All that runs is that of `pdjax bench`."""

import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from experiments.common.shapes import random_model
from pdjax.bench.driver import Driver, Workload
from pdjax.bench.modes import mode_config
from pdjax.bench.record import slo_json
from pdjax.bench.system import System, device_system, server_system, simulated_system
from pdjax.config import Config, DecodeConfig, HandoffConfig, KVConfig, PrefillConfig
from pdjax.config.load import load_config
from pdjax.core.slo import SLO
from pdjax.sim.calibration import Calibration
from pdjax.workloads.chances import Arrivals, lengths_of
from pdjax.workloads.synthetic import Shape, open_loop, shared_prefixes

POINT = (
    *("completed", "failed", "shed", "duration", "request_throughput", "output_throughput"),
    *("request_goodput", "slo_good", "slo_total", "slo_attainment", "mean_queue_ms"),
    *(f"{kind}_{name}_ms" for name in ("ttft", "tpot") for kind in ("mean", "median", "p90")),
    *("p99_ttft_ms", "p99_tpot_ms", "median_itl_ms", "p99_itl_ms", "median_e2el_ms"),
    *("tput_per_gpu", "output_tput_per_gpu", "goodput_per_gpu", "num_gpu", "num_prefill_gpu"),
    *("num_decode_gpu", "total_cached_tokens", "max_late_ms", "errors_by_reason"),
)
"""The keys of a run that are kept; `docs/metrics.md` defines them."""


@dataclass(frozen=True)
class Size:
    """How large an experiment is.

    Attributes:
      model: its shapes, a name of `shapes.MODELS`.
      longest: tokens of the longest sequence.
      page_size, budget, rows, groups: of the base config: tokens a page, tokens of a prefill step,
        rows of a decode engine, layer groups of a hand-off.
      one_shape: whether engines compile one shape of each step, as a start takes no longer then.
      input_len, output_len: tokens of prompts and of answers, as flags have them.
      ttft_ms, tpot_ms: what makes a request good.
    """

    model: str
    longest: int
    page_size: int
    budget: int
    rows: int
    groups: int
    one_shape: bool
    input_len: str
    output_len: str
    ttft_ms: float
    tpot_ms: float


SIZES = {
    "full": Size("llama3_8b", 4096, 64, 2048, 64, 4, False, "2048", "256", 300.0, 10.0),
    "small": Size("tiny", 128, 8, 32, 4, 1, True, "24", "8", 2000.0, 200.0),
}
"""`full` is for simulations, accelerators and servers, `small` for the CPU. Four layer groups are
what the planner of hand-offs chooses for `full` between two H200."""


@dataclass(frozen=True)
class Server:
    """A server that is driven in place of modes; see `server_system`."""

    url: str
    vocab_size: int
    chips: int | None
    label: str


@dataclass(frozen=True)
class Study:
    """What an experiment goes by.

    Attributes:
      backend: "sim", "engine", or "url" of `server`.
      size: the name of its size.
      input_len, output_len: as in `Size`.
      slo: what makes a request good.
      base: the config that modes are made of.
      modes: that are compared; of a server, its label.
      seeds: one run each.
      calibration: of a simulation: what steps and links take.
      server: that is driven.
      prefix_len, prefix_groups, prefix_share: of shared prefixes before prompts; no prefix without
        a length.
      keep: whether each request's record is kept.
    """

    backend: str
    size: str
    input_len: str
    output_len: str
    slo: SLO
    base: Config
    modes: tuple[str, ...]
    seeds: tuple[int, ...]
    calibration: Calibration | None = None
    server: Server | None = None
    prefix_len: str | None = None
    prefix_groups: int = 1
    prefix_share: float = 1.0
    keep: bool = False

    def described(self) -> dict[str, Any]:
        """What is the same in all of its runs, as plain values."""
        known = self.calibration
        return {
            "backend": self.backend,
            "size": self.size,
            "input_len": self.input_len,
            "output_len": self.output_len,
            "prefix_len": self.prefix_len,
            "prefix_groups": self.prefix_groups if self.prefix_len else None,
            "prefix_share": self.prefix_share if self.prefix_len else None,
            "slo": slo_json(self.slo),
            "costs": None if known is None else asdict(known.costs),
            "link": None if known is None or known.link is None else asdict(known.link),
            "sources": None if known is None else list(known.sources),
            "config": None if self.server is not None else asdict(self.base),
        }

    def workload(self, rate: float, requests: int, seed: int, burstiness: float = 1.0) -> Workload:
        """Requests that arrive at a rate, the same at every rate of a seed. They ask for the SLO,
        which some modes go by; a server is not told it, as it may refuse what it does not know."""
        shape = Shape(lengths_of(self.input_len), lengths_of(self.output_len))
        process = Arrivals(rate, burstiness)
        if self.prefix_len:
            prefix = lengths_of(self.prefix_len)
            groups, share = self.prefix_groups, self.prefix_share
            made = shared_prefixes(process, prefix, shape, requests, groups, share, seed)
        else:
            made = open_loop(process, shape, requests, seed)
        asked = None if self.server is not None else self.slo
        return Workload([replace(a, slo=asked) for a in made], rate, burstiness, None, seed)

    def of_lengths(self, input_len: str, output_len: str) -> "Study":
        """The same with requests of other lengths."""
        return replace(self, input_len=input_len, output_len=output_len)

    def config(self, mode: str, overrides: Mapping[str, Any] | None = None) -> Config:
        """The config of a mode; `overrides` are of the base that it is made of.

        Raises:
          ValueError: as `mode_config`.
        """
        return mode_config(mode, load_config(self.base, dict(overrides or {})))

    @contextmanager
    def serving(self, mode: str, overrides: Mapping[str, Any] | None = None) -> Iterator["Serving"]:
        """Start what serves a mode, until the context ends.

        Raises:
          ValueError: what cannot work, or overrides of a server's config.
        """
        began = time.perf_counter()
        if self.server is not None:
            if overrides:
                raise ValueError(f"url={self.server.url}: has a config of its own")
            of = self.server
            system = server_system(of.url, vocab_size=of.vocab_size, chips=of.chips)
            yield Serving(self, mode, system, 0.0)
        elif self.backend == "sim":
            yield Serving(self, mode, self._simulated(self.config(mode, overrides)), 0.0)
        else:
            with device_system(self.config(mode, overrides)) as system:
                yield Serving(self, mode, system, time.perf_counter() - began)

    def _simulated(self, config: Config) -> System:
        """A cluster anew for each workload, so that no run waits for what another has left."""
        assert self.calibration is not None, "of a simulation"
        config = replace(config, max_recorded=1_000_000)
        known = config, self.calibration
        return replace(
            simulated_system(*known),
            play=lambda arrivals, salt: simulated_system(*known).play(arrivals, salt),
        )


class Serving:
    """A mode that is served.

    Attributes:
      mode: its name.
      start_s: seconds that its engines took to start; 0 of simulations and servers.
      chips: that it has.
      records: of the last run, a line each; see `record_json`.
    """

    def __init__(self, study: Study, mode: str, system: System, start_s: float) -> None:
        self._study, self._system = study, system
        self.mode, self.start_s, self.chips = mode, start_s, system.chips.all
        # A server may have the prompts of another experiment in its prefix cache.
        salt = secrets.token_hex(4) if study.server else ""
        warmups = 0 if study.backend == "sim" else 2
        self._driver = Driver(system, study.slo, warmups=warmups, salt=salt)
        self.records: list[dict[str, Any]] = []

    def run(self, workload: Workload, **names: Any) -> dict[str, Any]:
        """Play a workload; the names of its point, and the keys POINT of its results."""
        self._driver.records.clear()
        found = self._driver.run(workload)
        self.records = [line for line in self._driver.records if line["phase"] == "profiling"]
        names = {"mode": self.mode, **names, "seed": workload.seed, "rate": workload.rate}
        return {**names, **{key: found[key] for key in POINT}}


def base_config(size: Size) -> Config:
    """One engine of each phase. Every pool keeps prefixes, and has pages for as many whole contexts
    as there are rows, whatever its chips do, so that no mode has less to reuse."""
    tokens = buckets = None
    if size.one_shape:
        tokens, buckets = (size.budget,), (size.longest // size.page_size,)
    pages = 1 + size.rows * (size.longest // size.page_size)
    return Config(
        model=random_model(size.model, size.longest),
        kv=KVConfig(page_size=size.page_size, prefix_cache=True),
        prefill=PrefillConfig(
            token_budget=size.budget, token_buckets=tokens, page_buckets=buckets, pages=pages
        ),
        decode=DecodeConfig(rows=size.rows, lookahead=2, page_buckets=buckets, pages=pages),
        handoff=HandoffConfig(layer_groups=size.groups),
    )
