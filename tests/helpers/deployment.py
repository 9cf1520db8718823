"""A small deployment of fake engines that are ready at once, for situations made by hand."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

from pdjax.config import Config, DecodeConfig, KVConfig, PrefillConfig
from pdjax.core.clock import VirtualClock
from pdjax.core.kv_layout import KVLayout, split_groups
from pdjax.core.request import Request, SamplingParams
from pdjax.host.coordinator import Coordinator
from pdjax.host.engines import EngineState
from pdjax.host.events import PolledEvents
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.policies.api import Policies
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.steps import StepKind
from pdjax.interfaces.transport import Pool
from tests.helpers.fake_engines import FakeDecodeEngine, FakeEngine, FakePrefillEngine
from tests.helpers.fake_guides import END_TOKEN, VOCAB
from tests.helpers.fake_transport import FakeTransport
from tests.helpers.fakes import (
    Chance,
    FakePool,
    expected_output,
)

LAYOUT = KVLayout.of_heads(
    num_layers=4, kv_heads=1, head_dim=1, page_size=4, dtype="float32", itemsize=4
)
CONFIG = Config(
    kv=KVConfig(prefix_cache=False),  # prompts made by hand begin alike, and each is computed whole
    prefill=PrefillConfig(token_budget=8, max_sequences=2, lookahead=0),
    decode=DecodeConfig(rows=2, lookahead=0),
    max_waiting=4,
)
MAX_MODEL_LEN = 40


@dataclass
class Deployment:
    """Fakes that are ready at once, and their coordinator."""

    coordinator: Coordinator
    prefill: list[FakePrefillEngine]
    decode: list[FakeDecodeEngine]
    transport: FakeTransport
    events: PolledEvents
    clock: VirtualClock
    recorder: Recorder

    def submit(
        self, name: str, prompt_len: int = 3, prompt: tuple[int, ...] | None = None, **params: Any
    ) -> Sequence:
        values = {"temperature": 0.0, "max_tokens": 5, "ignore_eos": True, **params}
        if prompt is None:
            prompt = tuple(1 + i % (VOCAB - 1) for i in range(prompt_len))
        request = Request(name, prompt, SamplingParams(**values), self.clock.now())
        return self.coordinator.submit(request)[0]

    def run(self) -> None:
        for _ in range(1000):
            if not self.coordinator.has_work:
                return
            self.coordinator.step()
            self.coordinator.check()
        raise AssertionError("no end in sight")

    def run_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(1000):
            if condition():
                return
            self.coordinator.step()
        raise AssertionError("it never came to that")

    def state(self, engine: FakeEngine) -> EngineState:
        """What the host keeps of an engine."""
        return self.coordinator.loop.fleet.engines[engine.id]


def deploy(
    config: Config = CONFIG,
    *,
    stages: tuple[int, ...] = (1,),
    pages: tuple[int, int] = (40, 40),
    colocated: bool = False,
    max_delay: int = 0,
    make_text: Callable[[Request], Any] | None = None,
    groups: int = 1,
    decode_page_size: int = LAYOUT.page_size,
    prefills: int = 1,
    policies: Policies | None = None,
    **coordinator: Any,
) -> Deployment:
    """Prefill engines, whose steps have so many layer groups, and decode engines of so many stages;
    colocated, each decode engine has the pool of a prefill engine. The rest is the coordinator's.
    """
    chance = Chance(0, max_delay=max_delay)
    layer_groups = split_groups(LAYOUT.num_layers, groups)
    prefill = [
        FakePrefillEngine(LAYOUT, pages[0], chance, layer_groups, name=f"prefill/{i}")
        for i in range(prefills)
    ]
    layout = replace(LAYOUT, page_size=decode_page_size)
    decode = [
        FakeDecodeEngine(
            replace(layout, stages=n),
            pages[1],
            config.decode.rows,
            chance,
            name=f"decode/{i}",
            pages=prefill[i].pages if colocated else None,
        )
        for i, n in enumerate(stages)
    ]
    engines: list[FakeEngine] = [*prefill, *decode]
    coordinator |= {"make_text": make_text, "policies": policies}
    return assemble(engines, chance, config, **coordinator)


def assemble(
    engines: list[FakeEngine],
    chance: Chance,
    config: Config = CONFIG,
    tiers: Seq[FakePool] = (),
    **further: Any,
) -> Deployment:
    """A coordinator of any engines, and tiers below their pools."""
    transport = FakeTransport(engines, chance, tiers=tiers)
    clock = VirtualClock()
    events, recorder = PolledEvents(clock), Recorder(clock)
    coordinator = Coordinator(
        config,
        vocab_size=VOCAB,
        max_model_len=MAX_MODEL_LEN,
        end_token_ids=[END_TOKEN],
        engines=engines,
        transport=transport,
        events=events,
        clock=clock,
        recorder=recorder,
        pools=[Pool(tier.id, tier.layout, tier.num_pages) for tier in tiers],
        **further,
    )
    prefill = [engine for engine in engines if isinstance(engine, FakePrefillEngine)]
    decode = [engine for engine in engines if isinstance(engine, FakeDecodeEngine)]
    return Deployment(coordinator, prefill, decode, transport, events, clock, recorder)


def expected(sequence: Sequence) -> list[int]:
    """The output of a sequence that has a deployment of its own."""
    return expected_output(sequence, LAYOUT.num_layers)


def most_in_flight(deployment: Deployment, kind: StepKind) -> int:
    """The most steps that an engine which accepts that kind has in flight."""
    fleet = deployment.coordinator.loop.fleet
    return max(len(state.in_flight) for state in fleet if kind in state.engine.accepts)
