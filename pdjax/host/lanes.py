"""What the coordinator keeps about each engine: who is there, which pages are whose, and what has
been dispatched and not been read yet."""

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pdjax.engine_api import DecodeEngine, PrefillEngine, Sampled, Ticket, Transfer
from pdjax.host.batch import Buckets, Chunk
from pdjax.host.member import Member
from pdjax.host.pages import PageAllocator
from pdjax.host.pipeline import Pipeline, Tick
from pdjax.request import Sequence

WorkT = TypeVar("WorkT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class InFlight(Generic[WorkT, ResultT]):
    """What was dispatched and not read yet: the work, its ticket, and whom an error concerns."""

    work: WorkT
    ticket: Ticket[ResultT]
    started: float
    members: tuple[Member, ...]


@dataclass(eq=False)
class PrefillLane:
    """A prefill engine. `running` are its PREFILLING sequences, oldest first."""

    index: int
    engine: PrefillEngine
    allocator: PageAllocator
    running: list[Sequence] = field(default_factory=list)
    in_flight: deque[InFlight[tuple[Chunk, ...], Sampled]] = field(default_factory=deque)

    @property
    def backlog(self) -> int:
        """Tokens to compute, or being computed."""
        computing = sum(chunk.tokens for step in self.in_flight for chunk in step.work)
        return computing + sum(seq.length - seq.prefilled for seq in self.running)


@dataclass(eq=False)
class DecodeLane:
    """A decode engine. `sequences` are its DECODING ones.

    `shares_with` are the prefill engines that keep their pages in the same pool.
    """

    index: int
    engine: DecodeEngine
    allocator: PageAllocator
    pipeline: Pipeline
    shares_with: frozenset[int]
    sequences: list[Sequence] = field(default_factory=list)
    in_flight: deque[InFlight[Tick, Sampled]] = field(default_factory=deque)


def make_lanes(
    prefill_engines: Seq[PrefillEngine],
    decode_engines: Seq[DecodeEngine],
    transfer: Transfer,
    rows: int,
    buckets: Buckets,
) -> tuple[list[PrefillLane], list[DecodeLane]]:
    """A lane an engine; engines that share a pool share its allocator.

    Raises:
      ValueError: pages that do not mean the same everywhere, or pools of which some are shared
        and some are not.
    """
    prefill = [
        PrefillLane(i, engine, PageAllocator(engine.num_pages))
        for i, engine in enumerate(prefill_engines)
    ]
    decode = []
    for j, engine in enumerate(decode_engines):
        for lane in prefill:
            lane.engine.layout.check_same_pages(engine.layout)
        shared = [lane for lane in prefill if transfer.shares_pool(lane.index, j)]
        allocator = shared[0].allocator if shared else PageAllocator(engine.num_pages)
        pipeline = Pipeline(engine.layout.stages, rows, buckets)
        shares_with = frozenset(lane.index for lane in shared)
        decode.append(DecodeLane(j, engine, allocator, pipeline, shares_with))
    sharing = sorted(index for lane in decode for index in lane.shares_with)
    if sharing and (sharing != list(range(len(prefill))) or len(decode) != len(prefill)):
        raise ValueError(
            f"shared pools: prefill engines {sharing} share theirs with a decode engine; "
            "either each of them shares with one of its own, or none does"
        )
    return prefill, decode


def is_ready(ticket: Ticket[Any]) -> bool:
    """Whether there is something to read; the error of work that has failed is, too."""
    try:
        return ticket.ready()
    except Exception:
        return True
