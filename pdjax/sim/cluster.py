"""The production coordinator over simulated engines on a virtual clock."""

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pdjax.config import Config
from pdjax.core.clock import VirtualClock
from pdjax.core.ids import EngineId, PoolId
from pdjax.core.kv_layout import KVLayout, split_groups
from pdjax.core.request import QueueFull, Request
from pdjax.core.roles import Role
from pdjax.formats.strict_json import dumps
from pdjax.host.coordinator import Coordinator
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.request import RequestMetrics
from pdjax.host.metrics.summary import report
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.events import EngineLost
from pdjax.interfaces.steps import StepKind
from pdjax.interfaces.transport import Pool
from pdjax.sim.costs import StepCosts
from pdjax.sim.engines import SimEngine
from pdjax.sim.events import ScheduledEvents
from pdjax.sim.links import Link, SimTransport
from pdjax.sim.meshes import SimMesh
from pdjax.workloads.arrival import Arrival
from pdjax.workloads.schedule import Call, Schedule

LLAMA3_8B = KVLayout.of_heads(32, 8, 128, page_size=64, dtype="bfloat16", itemsize=2)
"""KV of Llama 3 8B in bfloat16, in pages of 64 tokens."""


@dataclass(frozen=True)
class Run:
    """What a cluster has done so far.

    Attributes:
      seconds: moment of the virtual clock.
      turns: calls of the coordinator's `step`.
      events: told to the coordinator.
      requests: what happened to each sequence that has ended, in the order of arrival.
      tokens: what each request was answered, a list a choice.
      refused: ids of requests that found the waiting queue full, and of those that wait for a
        request that has not ended well.
      report: statistics, see `host/metrics/summary.py`.
    """

    seconds: float
    turns: int
    events: int
    requests: tuple[RequestMetrics, ...]
    tokens: Mapping[str, list[list[int]]]
    refused: tuple[str, ...]
    report: Mapping[str, Any]

    def to_json(self) -> str:
        """All of it; the same run gives the same text."""
        counts = {"seconds": self.seconds, "turns": self.turns, "events": self.events}
        return dumps(
            {**counts, "refused": list(self.refused), "tokens": self.tokens, **self.report}
        )


def wiring(
    config: Config, costs: StepCosts | None = None, link: Link | None = None
) -> dict[str, Any]:
    """Arguments of a `Cluster` whose pools are shared and linked as those of a deployment: the two
    phases of a replica share its pool, and nothing links replicas. `costs` and `link` take the
    place of the usual ones."""
    given = {"costs": costs or StepCosts(), "link": link or Link()}
    if config.colocated:
        return {**given, "shared": config.prefill.engines, "link": None}
    return given


HOST_LINK = Link(47e9, 10e-6)
"""Between a pool of an engine and a tier in host memory: an H200's rate from and to pinned memory,
256 MB at once."""

DISK_LINK = Link(3e9, 1e-4)
"""Between the tier in host memory and one on a disk: about what an NVMe disk is sold as."""


class Cluster:
    """Simulated engines under the production coordinator.

    `config.prefill.engines` and `config.decode.engines` say how many engines there are of each
    kind. Prefill engine i is "prefill/i", with a mesh and a pool "hbm/prefill-i" of its own; decode
    engines likewise. The first `shared` of both kinds share meshes and pools: "prefill/i" and
    "decode/i" then keep their pages in "hbm/i"; with `prefill.mixed_budget` they are one engine,
    "mixed/i". Engines that `config.flexible` names accept all kinds of steps. With `tiers.host_gb`
    all pools have a tier "host/0", and that one "disk/0" with `tiers.disk_gb`.

    Args:
      config: bounds, budgets and policies of the coordinator. `prefill.pages` and `decode.pages`
        None are `prefill.max_sequences` and `decode.rows` whole contexts; a shared pool has
        `decode.pages`, and that of a flexible engine both. `handoff.layer_groups` None is one
        group.
      layout: of the pages of prefill pools, with `kv.page_size` tokens each; decode pools are of
        `decode.page_size`, `decode.stages` and `decode.tp`. None is that of Llama 3 8B.
      shared: how many engines of each kind share a mesh and a pool.
      max_model_len: tokens of prompt and output together.
      vocab_size: token ids are below it; simulated engines never choose 0.
      costs: seconds of steps and writes.
      link: what each link can do; None connects only the pairs of `links`.
      links: (source, target) -> what the link between these two can do instead.
      host_link: what the links between the tier in host memory and each pool can do; `disk_link`
        what that between this tier and the one on a disk can do.
      coordinator: further arguments of the coordinator, such as `policies`.

    Attributes:
      clock, events, transport, recorder, coordinator: what it is made of.
      engines: by their ids.
      sequences: of each request that was let in, one a choice.
      turns: calls of the coordinator's `step` so far.

    Raises:
      ValueError: more shared pools than engines of a kind, or ones that decode in stages.
    """

    def __init__(
        self,
        config: Config,
        layout: KVLayout | None = None,
        *,
        shared: int = 0,
        max_model_len: int = 4096,
        vocab_size: int = 1000,
        costs: StepCosts = StepCosts(),  # noqa: B008 - a frozen value
        link: Link | None = Link(),  # noqa: B008 - a frozen value
        links: Mapping[tuple[PoolId, PoolId], Link] | None = None,
        host_link: Link = HOST_LINK,
        disk_link: Link = DISK_LINK,
        **coordinator: Any,
    ) -> None:
        self.config, self.vocab_size = config, vocab_size
        self.clock = VirtualClock()
        self.events = ScheduledEvents(self.clock)
        self.recorder = Recorder(self.clock, keep=config.max_recorded)
        layout = layout or replace(LLAMA3_8B, page_size=config.kv.page_size)
        meshes = _meshes(self.clock, config, layout, shared, max_model_len)
        tiers = _tiers(self.clock, config, layout)
        ways = [(mesh, tier, host_link) for mesh in meshes.values() for tier in tiers[:1]]
        ways += [(tiers[0], tier, disk_link) for tier in tiers[1:]]
        to_tiers = {
            ends: way
            for upper, lower, way in ways
            for ends in ((upper.pool, lower.pool), (lower.pool, upper.pool))
        }
        self.transport = SimTransport(
            self.clock,
            dict.fromkeys([*meshes.values(), *tiers]),
            write_seconds=costs.write,
            link=link,
            links={**to_tiers, **(links or {})},
        )
        self.engines = {
            id: _engine(id, mesh, self.transport, config, costs, vocab_size)
            for id, mesh in meshes.items()
        }
        self.coordinator = Coordinator(
            config,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            end_token_ids=(),
            engines=list(self.engines.values()),
            transport=self.transport,
            events=self.events,
            clock=self.clock,
            recorder=self.recorder,
            roles={id: _role(id) for id in self.engines},
            pools=[Pool(tier.pool, tier.layout, tier.num_pages) for tier in tiers],
            **coordinator,
        )
        self.turns = 0
        self.sequences: dict[str, list[Sequence]] = {}
        self._agenda: list[tuple[float, int, Callable[[], object]]] = []  # a heap
        self._order = itertools.count()
        self._asked = 0
        self._followed: dict[str, tuple[Schedule, Call]] = {}  # requests that others wait for
        self._refused: list[str] = []

    def at(self, moment: float, action: Callable[[], object]) -> None:
        """Do something when the clock has come to `moment`, before the coordinator's next turn; of
        the same moment, in the order of the calls."""
        heapq.heappush(self._agenda, (moment, next(self._order), action))
        self.events.wake_at(moment)

    def expect(self, arrivals: Iterable[Arrival], *, start: float = 0.0, salt: str = "") -> None:
        """Let requests arrive, each at its moment, or when those that they wait for have ended.

        Args:
          start: of the workload, on the cluster's clock.
          salt: another salt gives other prompts, of which no prefix cache knows.

        Raises:
          ValueError: a workload that contradicts itself; see `Schedule`.
        """
        schedule = Schedule(arrivals, self.vocab_size, salt, self._asked, start)
        self._asked += schedule.count
        self._expect_due(schedule)

    def expect_request(self, request: Request) -> None:
        """Let a request arrive at `request.arrival`."""
        self.at(request.arrival, lambda: self._submit(request))

    def lose(self, engine: EngineId) -> None:
        """Lose an engine's mesh now, and all that is kept there; the coordinator is told."""
        self.engines[engine].lose()
        for each in self.engines.values():
            if each.pool == self.engines[engine].pool:
                self.events.post(EngineLost(each.id, each.losses))

    def run(self) -> Run:
        """`serve`, and say what has happened."""
        self.serve()
        return self.so_far()

    def serve(self) -> None:
        """Go on until nothing is expected any more and every request has ended."""
        while self._agenda or self.coordinator.has_work:
            now = self.clock.now()
            while self._agenda and self._agenda[0][0] <= now:
                heapq.heappop(self._agenda)[2]()
            if self.coordinator.has_work:
                news = self.coordinator.step()  # waits where there is nothing to do
                self.turns += 1
                for progress in news if self._followed else ():
                    if progress.finished:
                        self._follow(progress.sequence)
            elif self._agenda:  # a timer of the coordinator's that is due can wait for a request
                self.clock.advance_to(self._agenda[0][0])

    def so_far(self) -> Run:
        """What has happened until now."""
        return Run(
            seconds=self.clock.now(),
            turns=self.turns,
            events=self.events.told,
            requests=tuple(self.recorder.requests()),
            tokens={
                id: [list(choice.output) for choice in choices]
                for id, choices in self.sequences.items()
            },
            refused=tuple(self._refused),
            report=report(self.recorder),
        )

    def _submit(self, request: Request) -> None:
        try:
            self.sequences[request.id] = self.coordinator.submit(request)
        except QueueFull:
            self._refused.append(request.id)
            self._break(request.id)

    def _expect_due(self, schedule: Schedule) -> None:
        """Let those of a workload arrive whose moments are known by now."""
        for call in schedule.take():
            if schedule.has_followers(call):
                self._followed[call.id] = schedule, call
            self.expect_request(call.request())

    def _follow(self, sequence: Sequence) -> None:
        """A sequence has ended; let those come that have waited for it."""
        if sequence.finish_reason not in ("stop", "length"):
            self._break(sequence.request.id)
        elif (followed := self._followed.pop(sequence.request.id, None)) is not None:
            schedule, call = followed
            schedule.ended(call, self.clock.now(), sequence.output)
            self._expect_due(schedule)

    def _break(self, id: str) -> None:
        """A request has not ended well, so that those after it never come."""
        if (followed := self._followed.pop(id, None)) is not None:
            schedule, call = followed
            self._refused += [arrival.name(number) for number, arrival in schedule.broken(call)]


def _meshes(
    clock: VirtualClock, config: Config, layout: KVLayout, shared: int, max_model_len: int
) -> dict[EngineId, SimMesh]:
    """The mesh of each engine."""
    prefill, decode = config.prefill, config.decode
    if not 0 <= shared <= min(prefill.engines, decode.engines):
        raise ValueError(
            f"shared={shared}: must be between 0 and the numbers of engines, "
            f"{prefill.engines} of prefill and {decode.engines} of decode"
        )
    if layout.page_size != config.kv.page_size:
        raise ValueError(
            f"kv.page_size={config.kv.page_size}: must be that of the layout, {layout.page_size}"
        )
    table = replace(layout, page_size=config.decode_page_size, stages=decode.stages, tp=decode.tp)
    if shared and table != layout:
        raise ValueError(f"shared={shared}: needs one layout, but decode would have {table}")
    held = prefill.pages or 1 + prefill.max_sequences * layout.pages_for(max_model_len)
    grown = decode.pages or 1 + decode.rows * table.pages_for(max_model_len)
    both = [SimMesh(clock, PoolId(f"hbm/{i}"), layout, grown) for i in range(shared)]
    meshes = dict[EngineId, SimMesh]()
    mixed = range(shared) if prefill.mixed_budget is not None else range(0)
    whole = held + grown - 1
    for i in mixed:
        meshes[EngineId(f"{StepKind.MIXED.value}/{i}")] = both[i]
    for kind, count, form, pages in (
        ("prefill", prefill.engines, layout, whole if config.prefill_is_flexible else held),
        ("decode", decode.engines, table, whole if config.decode_is_flexible else grown),
    ):
        for i in range(len(mixed), count):
            own = PoolId(f"hbm/{kind}-{i}")
            mesh = both[i] if i < shared else SimMesh(clock, own, form, pages)
            meshes[EngineId(f"{kind}/{i}")] = mesh
    return meshes


def _tiers(clock: VirtualClock, config: Config, layout: KVLayout) -> list[SimMesh]:
    """The tier in host memory, and the one on a disk below it, if there are such."""
    whole = replace(layout, tp=1)
    pages = {"host/0": config.tiers.host_pages(whole.page_bytes)}
    if config.tiers.disk_bytes:
        pages["disk/0"] = 1 + max(1, config.tiers.disk_bytes // whole.page_bytes)
    return [SimMesh(clock, PoolId(name), whole, count) for name, count in pages.items() if count]


def _role(id: EngineId) -> Role:
    """That of an engine at the start: its name says it."""
    return Role(id.partition("/")[0])


def _accepts(role: Role, config: Config) -> frozenset[StepKind]:
    """The steps that an engine of a role at the start is built for."""
    flexible = {Role.PREFILL: config.prefill_is_flexible, Role.DECODE: config.decode_is_flexible}
    return frozenset(StepKind) if flexible.get(role, True) else frozenset({StepKind(role.value)})


def _engine(
    id: EngineId,
    mesh: SimMesh,
    transport: SimTransport,
    config: Config,
    costs: StepCosts,
    vocab_size: int,
) -> SimEngine:
    accepts = _accepts(_role(id), config)
    groups = config.handoff.layer_groups or 1
    return SimEngine(
        id,
        mesh,
        transport,
        accepts=accepts,
        rows=config.decode.rows if StepKind.DECODE in accepts else 0,
        layer_groups=split_groups(mesh.layout.num_layers, groups),
        costs=costs,
        vocab_size=vocab_size,
    )
