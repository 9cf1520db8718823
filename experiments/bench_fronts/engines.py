"""Engines that take a given time and no device, and a deployment of the real session over them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.bench_host.__main__ import InstantEngine, NoTransport
from pdjax.config import Config, DecodeConfig, KVConfig, PrefillConfig
from pdjax.core.clock import WallClock
from pdjax.core.kv_layout import KVLayout
from pdjax.deploy import Deployment
from pdjax.host.coordinator import Coordinator
from pdjax.host.events import PolledEvents
from pdjax.host.metrics.recorder import Recorder
from pdjax.interfaces.batches import Sampled
from pdjax.interfaces.steps import Step, StepKind
from pdjax.interfaces.transport import TransferTicket
from pdjax.request_maker import RequestMaker, text_maker
from pdjax.session import Session
from pdjax.text.byte_tokenizer import VOCAB_SIZE, byte_tokenizer

PAGE_SIZE = 16


@dataclass(frozen=True)
class Due:
    """A ticket that is ready from a moment of `perf_counter` on."""

    moment: float
    outcome: Sampled
    exports: Mapping[int, TransferTicket] = field(default_factory=dict)
    made: bool = True

    def ready(self) -> bool:
        return time.perf_counter() >= self.moment

    def result(self) -> Sampled:
        return self.outcome


class PacedEngine(InstantEngine):
    """An engine whose steps take `seconds` each, with letters for tokens.

    Attributes:
      seconds: of a step.
      lags: of each step that was asked for when the one before was done: seconds between the two.
    """

    def __init__(self, kind: StepKind, layout: KVLayout, num_pages: int, rows: int) -> None:
        super().__init__(kind, layout, num_pages, rows, tokens=(97, 123))
        self.seconds, self.lags = 0.0, list[float]()
        self._free: float | None = None

    def submit(self, step: Step) -> Due:
        del step
        now = time.perf_counter()
        if self._free is not None and now >= self._free:
            self.lags.append(now - self._free)
        self._free = max(now, self._free or now) + self.seconds
        return Due(self._free, self.sampled)

    def start_over(self, seconds: float) -> None:
        """Forget the lags; steps take so long from now on."""
        self.seconds, self._free = seconds, None
        self.lags.clear()


def config_of(rows: int) -> Config:
    """The config of a deployment whose decode engine has so many rows."""
    return Config(
        kv=KVConfig(prefix_cache=False),
        prefill=PrefillConfig(token_budget=1024, lookahead=0),
        decode=DecodeConfig(rows=rows, lookahead=0),
        max_waiting=4 * rows,
    )


def deployment(config: Config, policies: Any, clock: Any, progress: Any) -> Deployment:
    """A deployment for `pdjax.deploy.BACKENDS`: one paced engine of each kind over one pool."""
    del policies, clock, progress
    rows, longest = config.decode.rows, config.model.max_model_len or 4096
    layout = KVLayout.of_heads(1, 1, 2, page_size=PAGE_SIZE, dtype="float32", itemsize=4)
    pages = 1 + rows * (longest // PAGE_SIZE + 2)
    tokenizer, wall = byte_tokenizer(), WallClock()
    kinds = StepKind.PREFILL, StepKind.DECODE
    engines = [PacedEngine(kind, layout, pages, rows) for kind in kinds]
    recorder = Recorder(wall, config.max_recorded)
    coordinator = Coordinator(
        config,
        vocab_size=VOCAB_SIZE,
        max_model_len=longest,
        end_token_ids=tokenizer.eos_token_ids,
        engines=engines,
        transport=NoTransport(),
        events=PolledEvents(wall),
        clock=wall,
        recorder=recorder,
        make_text=text_maker(tokenizer),
    )
    no_model: Any = None
    return Deployment(
        config=config,
        spec=no_model,
        tokenizer=tokenizer,
        max_model_len=longest,
        backing=engines,
        engines=engines,
        transport=NoTransport(),
        coordinator=coordinator,
        clock=wall,
        recorder=recorder,
        session=Session(coordinator, recorder),
        requests=RequestMaker("bytes", tokenizer, wall),
    )
