"""From a config to what serves it: engines of a backend, and the coordinator over them.

This is the only file that joins the columns. `LLM` and `AsyncLLM` stand on a `Deployment`.
"""

import os
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pdjax.config import Config
from pdjax.config.load import load_config
from pdjax.core.clock import Clock, WallClock
from pdjax.core.messages import shown
from pdjax.core.model_spec import ModelSpec
from pdjax.core.progress import Progress
from pdjax.core.recompute import RecomputeCost
from pdjax.device.builder import build_engines
from pdjax.device.checkpoints.api import Checkpoint
from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.device.devices import deal_devices, settled
from pdjax.device.models.registry import kv_layout, matrix_params
from pdjax.disk.slot_store import SlotStore
from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.largest import largest_steps
from pdjax.host.coordinator import Coordinator
from pdjax.host.events import PolledEvents
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.policies.registry import make_policies
from pdjax.host.sequences.guide_threads import GuideThreads
from pdjax.interfaces.engine import Engine
from pdjax.interfaces.transport import Transport
from pdjax.request_maker import RequestMaker, guide_maker, text_maker
from pdjax.session import Session
from pdjax.sim.cluster import Cluster, wiring
from pdjax.sim.costs import StepCosts
from pdjax.sim.links import Link
from pdjax.text.guides import GuideCompiler
from pdjax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Model:
    """What is served: its shapes, its tokenizer and what compiles guides where it has one, the
    longest sequence in tokens, and where its weights are; random ones are nowhere."""

    spec: ModelSpec
    tokenizer: Tokenizer | None
    max_model_len: int
    checkpoint: Checkpoint | None
    guides: GuideCompiler | None = None


@dataclass(eq=False)
class Deployment:
    """A model that is served.

    Attributes:
      config: of the run.
      spec, tokenizer: the model's shapes, and its tokenizer where it has one.
      max_model_len: tokens of prompt and output together.
      backing: what the backend made, for experiments that know which one it is: `Engines` of
        `device/builder.py`, or a `Cluster` of `sim/cluster.py`.
      engines, transport: behind the door of the coordinator.
      coordinator, clock, recorder: the loop; its time; what happened when.
      session: the book of requests over the coordinator.
      requests: makes requests of prompts and conversations.
      disk: the store of the tier on a disk, where there is one.
    """

    config: Config
    spec: ModelSpec
    tokenizer: Tokenizer | None
    max_model_len: int
    backing: Any
    engines: Seq[Engine]
    transport: Transport
    coordinator: Coordinator
    clock: Clock
    recorder: Recorder
    session: Session
    requests: RequestMaker
    disk: SlotStore | None = None

    def close(self) -> None:
        """Abort every request that has not ended, let the engines come to rest, and free what they
        hold. Nothing is served from then on. A second call does nothing.

        Raises:
          RuntimeError: called by a callback of a turn; nothing has been closed then.
        """
        self.session.refuse_within_turn()
        try:
            self.session.close()
        except Exception:
            self.close_engines()
            raise
        self.close_engines()

    def close_engines(self) -> None:
        """Let go of what the engines hold."""
        for engine in self.engines:
            engine.close()
        self.transport.close()
        self.coordinator.close()


def deploy(
    config: str | Config = "smollm2",
    backend: str = "device",
    policies: Mapping[str, Any] | None = None,
    *,
    clock: Clock | None = None,
    progress: bool = True,
    costs: StepCosts | None = None,
    link: Link | None = None,
) -> Deployment:
    """Make what serves a config.

    Args:
      config: a config file, a preset's name, or a Config.
      backend: "device" loads the model onto devices of this process. "sim" simulates the engines
        and links on a virtual clock, with the constant costs of `pdjax/sim/`: tokens and their
        times come without a device, and mean nothing.
      policies: in place of those that the config names, by "prefill", "decode", "handoff" or
        "router": a name, a class that is called with a `PolicySetup`, or an object; see
        `host/policies/api.py`.
      clock: tells the time; wall time unless given. A simulation has a clock of its own.
      progress: tell on stderr what a start of more than a second is doing; see `core/progress.py`.
      costs, link: of a simulation, seconds of steps and what a link can do, in place of the usual
        ones.

    Raises:
      ValueError: no such backend, costs or a link of real devices, or a config, policy, model or
        layout that cannot work, with the field, its value and what is allowed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={shown(backend)}: allowed are {', '.join(BACKENDS)}")
    given = {name: each for name, each in (("costs", costs), ("link", link)) if each is not None}
    if given and backend != "sim":
        raise ValueError(f'{", ".join(given)}: of backend="sim" alone; backend={shown(backend)}')
    told = Progress(progress)
    made = BACKENDS[backend](load_config(config), policies, clock, told, **given)
    told.end("ready")
    return made


def _on_devices(
    config: Config, policies: Mapping[str, Any] | None, clock: Clock | None, progress: Progress
) -> Deployment:
    with progress.phase("starting JAX"):
        config = settled(config)
        _check_mixing(config)
        deal_devices(config)  # too few are no reason to fetch and open a model first
    chosen = make_policies(config, policies)
    with progress.phase("opening the model"):
        model = _open_model(config)
    longest = model.max_model_len
    steps = partial(largest_steps, config, context=longest)
    built = build_engines(config, model.spec, longest, model.checkpoint, progress, steps)
    try:
        clock = clock or (WallClock(patience=0) if built.on_host_cores else WallClock())
        recorder = Recorder(clock, config.max_recorded)
        events = PolledEvents(clock)
        coordinator = Coordinator(
            config,
            vocab_size=model.spec.vocab_size,
            max_model_len=model.max_model_len,
            end_token_ids=model.spec.eos_token_ids,
            engines=built.engines,
            transport=built.transport,
            events=events,
            clock=clock,
            recorder=recorder,
            policies=chosen,
            roles=built.roles,
            pools=built.tiers,
            make_text=text_maker(model.tokenizer),
            make_guide=guide_maker(model.guides),
            guides=GuideThreads(_guide_threads(), events.wake),
            recompute=RecomputeCost.of(model.spec, matrix_params(model.spec)),
        )
        if config.warm_up:
            coordinator.warm_up(partial(progress.each, unit="shapes"))
            recorder.clear()
    except BaseException:  # also Ctrl-C, while it warms up
        built.close()
        raise
    parts = built.engines, built.transport, coordinator, clock, recorder
    return replace(_deployment(config, model, built, *parts), disk=built.disk)


def _check_mixing(config: Config) -> None:
    """Refuse mixed steps without an engine that takes them, and a placement that needs them."""
    budget = config.prefill.mixed_budget
    if config.policies.placement == "conditional" and budget is None:
        raise ValueError(
            'policies.placement="conditional": needs engines that accept mixed steps, so '
            'prefill.mixed_budget and flexible="decode" or "all" (or colocated=True)'
        )
    if budget is not None and not config.colocated and not config.decode_is_flexible:
        raise ValueError(
            f"prefill.mixed_budget={budget}: must be None with colocated=False and "
            'flexible="none", where no engine has both chunks and rows'
        )


def _simulated(
    config: Config,
    policies: Mapping[str, Any] | None,
    clock: Clock | None,
    progress: Progress,
    costs: StepCosts | None = None,
    link: Link | None = None,
) -> Deployment:
    config = replace(config, colocated=bool(config.colocated))  # it has all devices it needs
    _check_mixing(config)
    if clock is not None:
        raise ValueError("clock: a simulation has a clock of its own; must be None")
    rounded = {
        "decode.kv_dtype": config.decode.kv_dtype,
        "handoff.wire_dtype": config.handoff.wire_dtype,
    }
    for field, value in rounded.items():
        if value is not None:
            raise ValueError(f"{field}={shown(value)}: a simulation rounds no KV; must be None")
    chosen = make_policies(config, policies)
    with progress.phase("opening the model"):
        model = _open_model(config)
    dtype = config.kv.dtype or config.model.dtype
    layout = kv_layout(model.spec, config.kv.page_size, dtype, tp=config.prefill.tp)
    cluster = Cluster(
        config,
        layout,
        **wiring(config, costs, link),
        max_model_len=model.max_model_len,
        vocab_size=model.spec.vocab_size,
        policies=chosen,
        make_text=text_maker(model.tokenizer),
        make_guide=guide_maker(model.guides),
        recompute=RecomputeCost.of(model.spec, matrix_params(model.spec)),
    )
    engines = list(cluster.engines.values())
    parts = engines, cluster.transport, cluster.coordinator, cluster.clock, cluster.recorder
    return _deployment(config, model, cluster, *parts)


BACKENDS: dict[str, Callable[..., Deployment]] = {
    "device": _on_devices,
    "sim": _simulated,
}
"""What makes the deployment of each backend; the line of a new one goes here."""


def _deployment(
    config: Config,
    model: _Model,
    backing: Any,
    engines: Seq[Engine],
    transport: Transport,
    coordinator: Coordinator,
    clock: Clock,
    recorder: Recorder,
) -> Deployment:
    return Deployment(
        config=config,
        spec=model.spec,
        tokenizer=model.tokenizer,
        max_model_len=model.max_model_len,
        backing=backing,
        engines=engines,
        transport=transport,
        coordinator=coordinator,
        clock=clock,
        recorder=recorder,
        session=Session(coordinator, recorder),
        requests=RequestMaker(config.model.source, model.tokenizer, clock, model.guides),
    )


def _open_model(config: Config) -> _Model:
    """The model of a config; no weights are read."""
    if config.model.spec is not None:  # random weights
        context = _context(config, config.model.spec)
        return _Model(config.model.spec.within(context), None, context, None)
    checkpoint = open_checkpoint(config.model.source)
    spec = checkpoint.spec
    tokenizer = checkpoint.tokenizer()
    guides = None if tokenizer is None else GuideCompiler(tokenizer, spec.vocab_size)
    context = _context(config, spec)
    return _Model(spec.within(context), tokenizer, context, checkpoint, guides)


def _guide_threads() -> int:
    """Half of the cores, and eight at the most: the others are for the coordinator and for those
    who talk to clients."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def _context(config: Config, spec: ModelSpec) -> int:
    """Longest sequence served, tokens; whether it can be is known before any weights are read."""
    asked = config.model.max_model_len
    if asked is not None and asked > spec.context:
        raise ValueError(
            f"model.max_model_len={asked}: the model's context is {spec.context}; "
            "must be at most that"
        )
    context = asked or spec.context
    Buckets.of(config.prefill, None, config.kv.page_size, context)
    Buckets.of(None, config.decode, config.decode_page_size, context)
    return context
