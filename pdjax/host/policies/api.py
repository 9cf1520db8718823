"""What a policy is: pure functions from what the host knows to a plan.

A policy sees views of engines and the sequences themselves, and changes neither. Nothing moves
until the coordinator has checked a plan and carries it out, so a policy can be tried on made-up
situations. An answer of another type than its method says, or that cannot be carried out, ends the
turn with a `BadPlan`; see `check.py`. Moments are seconds on the coordinator's clock; `now` is the
moment of the call.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pdjax.config import Config
from pdjax.core.ids import EngineId, PoolId
from pdjax.core.roles import Role
from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.chunks import Chunk
from pdjax.host.kv.eviction import EvictionPolicy
from pdjax.host.sequences.sequence import Sequence
from pdjax.host.step_times import StepTimes
from pdjax.interfaces.steps import StepKind

ShedCause = Literal["overload", "deadline", "impossible"]


@dataclass(frozen=True, slots=True)
class EngineView:
    """An engine, as a policy sees it.

    Attributes:
      engine: its name. `pool`: the pool of its pages.
      accepts: the steps that it may be given. `role`: the new work that it is given.
      buckets: the sizes of its steps and pages.
      open: whether it takes another step now.
      running: its sequences with prompt tokens still to dispatch, oldest first.
      backlog: prompt tokens that it has been given and has not finished: the measure of its load.
      steps: prefill steps that it has been given so far; `in_flight`: those that have not come
        back.
      beside_rows: most prompt tokens of its next step, where rows decode in the same step; None
        where none do, and `buckets` say how many.
      rows: decode rows, all of them; `free_rows`: those that are free.
      free_pages: pages of the pool that may be reserved now; 0 for a prefill policy where the
        engine goes on with its prompts and is given no others. `total_pages`: all that it will
        have.
      leaving_pages: pages of the pool that hand-offs hold until their KV has arrived elsewhere.
      rows_of_pool: decode rows that are taken, over all engines of the pool.
      cached: of a sequence that waits, the tokens at its front whose KV is in the pool already.
      sources: the pools from which KV can come to this one, its own included.
      prefill_times: what its prefill steps take by their tokens.
      token_times: what its rows wait for each token, by how many rows are active: a tick for each
        stage.
    """

    engine: EngineId
    pool: PoolId
    accepts: frozenset[StepKind]
    buckets: Buckets
    open: bool
    running: tuple[Sequence, ...]
    backlog: int
    steps: int
    rows: int
    free_rows: int
    free_pages: int
    total_pages: int
    rows_of_pool: int
    cached: Callable[[Sequence], int]
    sources: frozenset[PoolId]
    in_flight: int = 0
    leaving_pages: int = 0
    prefill_times: StepTimes = field(default_factory=StepTimes)
    token_times: StepTimes = field(default_factory=StepTimes)
    beside_rows: int | None = None
    role: Role = Role.MIXED

    @property
    def token_budget(self) -> int:
        """Most prompt tokens of its next step."""
        return self.buckets.token_budget if self.beside_rows is None else self.beside_rows


@dataclass(frozen=True)
class StepPlan:
    """One prefill step of an engine. Its sequences that are WAITING are admitted by it: pages for
    all their tokens are reserved."""

    engine: EngineId
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class AskAgain:
    """The policy is asked again at a moment, even if nothing happens until then: it lets prompts
    gather, or holds one back.

    Attributes:
      at: the moment, after now.
    """

    at: float


@dataclass(frozen=True)
class Admission:
    """A sequence is to decode on an engine. It is handed over to the engine's pool, or stays in its
    pool where that is the same."""

    sequence: Sequence
    engine: EngineId


@dataclass(frozen=True)
class Migration:
    """A sequence that decodes is to go on on another engine."""

    sequence: Sequence
    engine: EngineId


@dataclass(frozen=True)
class GrowthPlan:
    """First all `victims` give up their pages, to be prefilled again; then each of `grown` gets one
    more page."""

    victims: tuple[Sequence, ...]
    grown: tuple[Sequence, ...]


@dataclass(frozen=True)
class Reservation:
    """Pages that an open hand-off holds in a pool and could give up.

    Attributes:
      handoff: the id of the hand-off.
      sequence: whose KV it moves.
      pages: how many it holds there.
      cache: whether its KV moves only to be found by later prompts; else a sequence is to decode
        there, whose prefill has not ended.
      opened: moment of the reservation.
    """

    handoff: int
    sequence: Sequence
    pages: int
    cache: bool
    opened: float


@dataclass(frozen=True)
class GiveBack:
    """KV of a finished sequence that could go back to the pool where the next turn of its
    conversation is prefilled.

    Attributes:
      sequence: has ended.
      tokens: whose KV would move.
      pages: that the target needs for them and does not hold already.
      free_pages: of the target, those aside that it holds already.
    """

    sequence: Sequence
    tokens: int
    pages: int
    free_pages: int


class Router(Protocol):
    """Chooses among engines that can all take a sequence now. It may remember what it has been
    asked and has answered, and nothing else: the same questions have the same answers."""

    def prefill_engine(self, sequence: Sequence, engines: Seq[EngineView]) -> EngineView:
        """The engine that prefills it."""
        ...

    def decode_engine(self, sequence: Sequence, engines: Seq[EngineView]) -> EngineView:
        """The engine that decodes it."""
        ...


@dataclass(frozen=True)
class Shed:
    """A sequence that waits is refused: it ends with finish reason "shed".

    Attributes:
      sequence: has written nothing yet. All choices of its request go with it; once one of them has
        begun or ended, all stay.
      cause: "overload": the same request may be served another time; "deadline": its time is over;
        "impossible": what it asks is less than it takes when it is alone.
      reason: for a reader, with numbers.
    """

    sequence: Sequence
    cause: ShedCause
    reason: str


class AdmissionPolicy(Protocol):
    """Decides which requests are refused early, so that others are served in time.

    Attributes:
      sheds: whether `shed` may ever name a sequence; else it is not asked.
    """

    sheds: bool

    def shed(
        self,
        arrived: Seq[Sequence],
        waiting: Seq[Sequence],
        prefill: Seq[EngineView],
        decode: Seq[EngineView],
        now: float,
    ) -> Seq[Shed | AskAgain]:
        """The sequences to refuse. It is asked when requests have come, and at the moments that it
        names by `AskAgain`.

        Args:
          arrived: that have come since it was last asked.
          waiting: the whole queue, those included, in its order.
          prefill, decode: the engines that are given such work, open or not.
        """
        ...


class Ranked(Protocol):
    """What a prefill or decode policy may have besides: an order of its own for its queue.

    The host keeps the queue so, and a plan need not look at all of it.
    """

    def rank(self, sequence: Sequence) -> Any:
        """What a sequence goes by in the queue, the least first; of equals the one that came into
        the queue first. A number or a tuple of numbers. It is asked when the sequence comes into
        the queue, and so depends on nothing that changes while it waits: let the moment of arrival
        stand for the time waited."""
        ...


class PrefillPolicy(Protocol):
    """Decides what engines prefill next. It may be `Ranked`."""

    def plan(
        self, waiting: Seq[Sequence], engines: Seq[EngineView], now: float
    ) -> Seq[StepPlan | AskAgain]:
        """At most one step for each engine.

        It is asked after events: about all open engines while a sequence waits, else about those
        that an event touched. A policy that waits for a moment and not for an event says so by
        `AskAgain`.

        Args:
          waiting: the queue, oldest first or by `rank`.
          engines: that are open, and are given prompts or have some to go on with.
        """
        ...


class DecodePolicy(Protocol):
    """Decides which sequences decode. It may be `Ranked`; then what is said to be oldest first
    comes in its order."""

    def grow(
        self, needing: Seq[Sequence], holders: Seq[Sequence], free_pages: int, now: float
    ) -> GrowthPlan:
        """Find a page for each of `needing`, which cannot enter the next tick without one.

        Args:
          needing: in any order; they are among the holders.
          holders: sequences that hold pages of the pool and can give them up at once.
          free_pages: of the pool.
        """
        ...

    def admit(
        self, prefilled: Seq[Sequence], engines: Seq[EngineView], now: float
    ) -> list[Admission]:
        """The sequences of `prefilled`, oldest first, that are handed over now, and where to.

        Args:
          engines: that are given sequences to decode.
        """
        ...

    def admit_ahead(
        self,
        streaming: Seq[Sequence],
        prefilled: Seq[Sequence],
        engines: Seq[EngineView],
        now: float,
    ) -> list[Admission]:
        """The sequences of `streaming` that get room ahead, so that their KV leaves while it is
        being computed. The engines named have another pool than theirs.

        Args:
          streaming: sequences of one pool whose prefill is about to be dispatched.
          prefilled: sequences that wait for room, oldest first.
          engines: that are given sequences to decode and that KV of this pool can reach; also those
            of the pool itself, where nothing has to leave.
        """
        ...


class HandoffPolicy(Protocol):
    """Decides whether KV moves, when and where to.

    Attributes:
      migrates: whether `migrations` may ever name a sequence; else it is not asked.
      returns: whether `gives_back` may ever be true; else it is not asked.
    """

    migrates: bool
    returns: bool

    def stays(self, sequence: Sequence) -> bool:
        """Whether a sequence that has just been given a token by a prefill step is given the next
        one there, too. If the pool's pages run out, it is handed over all the same."""
        ...

    def streams(self, sequence: Sequence) -> bool:
        """Whether the KV of a sequence may leave before its prefill has ended."""
        ...

    def gives_back(self, move: GiveBack) -> bool:
        """Whether the KV of a finished sequence goes back to where it was prefilled."""
        ...

    def withdraw(self, reservations: Seq[Reservation], pages: int, now: float) -> Seq[Reservation]:
        """The reservations to give up, since sequences that decode need `pages` more pages of the
        pool than are free."""
        ...

    def migrations(
        self,
        engines: Seq[EngineView],
        decoding: Mapping[EngineId, Seq[Sequence]],
        prefilled: Seq[Sequence],
        migrating: int,
        now: float,
    ) -> list[Migration]:
        """The sequences that leave the engine that decodes them for another.

        Args:
          engines: that are given sequences to decode.
          decoding: the sequences that decode on each.
          prefilled: sequences that wait for room, oldest first.
          migrating: sequences that are on their way between two engines.
        """
        ...


@dataclass(frozen=True)
class PolicySetup:
    """What a policy is constructed with.

    Attributes:
      config: of the run.
      router: of the deployment; None where a router itself is constructed.
    """

    config: Config
    router: Router | None = None


@dataclass(frozen=True)
class Policies:
    """The policies of a deployment."""

    prefill: PrefillPolicy
    decode: DecodePolicy
    handoff: HandoffPolicy
    router: Router
    admission: AdmissionPolicy
    eviction: EvictionPolicy
