"""What the coordinator keeps about each engine: who is there, which pages are whose, and what has
been dispatched and not been read yet."""

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.chunks import Chunk
from pdjax.host.batching.decode_pipeline import Pipeline, Tick
from pdjax.host.kv.pages import PageAllocator
from pdjax.host.kv.prefix_index import PrefixIndex
from pdjax.host.sequences.reference import Member
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.batches import Sampled
from pdjax.interfaces.engine import DecodeEngine, PrefillEngine
from pdjax.interfaces.tickets import Ticket
from pdjax.interfaces.transfer import End, Side, Transfer

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
class Pool:
    """The pages of a pool, as the host keeps them; engines that share a pool share this.

    `prefixes` finds the pages of what has been computed; None where nothing is kept.
    """

    allocator: PageAllocator
    prefixes: PrefixIndex | None

    @classmethod
    def of(cls, engine: PrefillEngine | DecodeEngine, prefix_cache: bool) -> "Pool":
        """All of an engine's pages, free."""
        allocator = PageAllocator(engine.num_pages)
        size = engine.layout.page_size
        return cls(allocator, PrefixIndex(allocator, size) if prefix_cache else None)


@dataclass(eq=False)
class PrefillLane:
    """A prefill engine. `running` are its PREFILLING sequences, oldest first; `steps` counts those
    that it has been given; `losses` are those of the engine that the host has taken account of."""

    index: int
    engine: PrefillEngine
    pool: Pool
    losses: int
    running: list[Sequence] = field(default_factory=list)
    in_flight: deque[InFlight[tuple[Chunk, ...], Sampled]] = field(default_factory=deque)
    steps: int = 0

    @property
    def end(self) -> End:
        """Its name in a hand-off."""
        return End(Side.PREFILL, self.index)

    @property
    def allocator(self) -> PageAllocator:
        """Of its pool."""
        return self.pool.allocator

    @property
    def backlog(self) -> int:
        """Tokens to compute, or being computed."""
        computing = sum(chunk.tokens for step in self.in_flight for chunk in step.work)
        return computing + sum(seq.length - seq.prefilled for seq in self.running)


@dataclass(eq=False)
class DecodeLane:
    """A decode engine. `sequences` are its DECODING ones; `losses` those of the engine that the
    host has taken account of.

    `shares_with` are the prefill engines that keep their pages in the same pool.
    """

    index: int
    engine: DecodeEngine
    pool: Pool
    losses: int
    pipeline: Pipeline
    shares_with: frozenset[int]
    sequences: list[Sequence] = field(default_factory=list)
    in_flight: deque[InFlight[Tick, Sampled]] = field(default_factory=deque)

    @property
    def end(self) -> End:
        """Its name in a hand-off."""
        return End(Side.DECODE, self.index)

    @property
    def allocator(self) -> PageAllocator:
        """Of its pool."""
        return self.pool.allocator


Lane = PrefillLane | DecodeLane


def make_lanes(
    prefill_engines: Seq[PrefillEngine],
    decode_engines: Seq[DecodeEngine],
    transfer: Transfer,
    rows: int,
    buckets: Buckets,
    *,
    prefix_cache: bool,
) -> tuple[list[PrefillLane], list[DecodeLane]]:
    """A lane an engine; engines that share a pool share its pages.

    Raises:
      ValueError: caches that do not mean the same everywhere, or pools of which some are shared
        and some are not.
    """
    prefill = [
        PrefillLane(i, engine, Pool.of(engine, prefix_cache), engine.losses)
        for i, engine in enumerate(prefill_engines)
    ]
    decode = []
    for j, engine in enumerate(decode_engines):
        for lane in prefill:
            lane.engine.layout.check_same_kv(engine.layout)
        end = End(Side.DECODE, j)
        shared = [lane for lane in prefill if transfer.shares_pool(lane.end, end)]
        pool = shared[0].pool if shared else Pool.of(engine, prefix_cache)
        pipeline = Pipeline(engine.layout.stages, rows, buckets)
        shares_with = frozenset(lane.index for lane in shared)
        decode.append(DecodeLane(j, engine, pool, engine.losses, pipeline, shares_with))
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
