"""What a policy is: pure functions from what the host knows to a plan.

A policy sees views of engines and the sequences themselves, and changes neither. Nothing moves
until the coordinator has checked a plan and carries it out, so a policy can be tried on made-up
situations. An answer of another type than its method says, or that cannot be carried out, ends the
turn with a `BadPlan`; see `check.py`. Moments are seconds on the coordinator's clock; `now` is the
moment of the call.
"""

from collections.abc import Hashable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pdjax.config import Config
from pdjax.core.ids import EngineId
from pdjax.host.batching.chunks import Chunk
from pdjax.host.kv.eviction import EvictionPolicy
from pdjax.host.policies.role_api import RolePolicy
from pdjax.host.policies.tiering_api import TieringPolicy
from pdjax.host.policies.view import EngineView as EngineView
from pdjax.host.sequences.queue import SequenceQueue
from pdjax.host.sequences.sequence import Sequence

ShedCause = Literal["overload", "deadline", "impossible"]


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


class PlacementPolicy(Protocol):
    """Decides where a sequence of the queue is prefilled, and how many prompt tokens join rows.

    Attributes:
      local: whether `engines_for` may ever name an engine that is for decode; else prefill policies
        do not see those that have no prompt begun.
    """

    local: bool

    def engines_for(
        self, sequence: Sequence, engines: Seq[EngineView], now: float
    ) -> Seq[EngineView]:
        """The engines that may prefill a sequence: the router chooses among those that have room
        now. While none of them has, the sequence waits, and those behind it in the queue may go to
        other engines. A prefill policy that uses `packing.Draft` asks this.

        Args:
          engines: all that accept prefill steps and have a role or a prompt that needs them: those
            that are for prefill and, where it is `local`, those that are for decode; open or not.
            Backlogs count what comes before the sequence.
        """
        ...

    def mixed_tokens(self, view: EngineView) -> int:
        """Most prompt tokens of the next step of an engine that accepts mixed steps and has rows,
        or is for decode: at most its largest mixed bucket; 0 keeps chunks away. It is asked before
        each plan."""
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
        waiting: SequenceQueue,
        prefill: Seq[EngineView],
        decode: Seq[EngineView],
        now: float,
    ) -> Seq[Shed | AskAgain]:
        """The sequences to refuse. It is asked when requests have come, when an engine has been
        measured for the first time, and at the moments that it names by `AskAgain`.

        Args:
          arrived: that have come since it was last asked.
          waiting: the whole queue, those included, in its order. It may be long: `tokens_before`
            says what is ahead of a sequence without a walk over it.
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


class Grouped(Protocol):
    """What a prefill policy may have besides: groups of sequences that wait, such as tenants.

    The host keeps the queue of each (`SequenceQueue.groups`), so that a plan need not sort all that
    waits.
    """

    def group(self, sequence: Sequence) -> Hashable:
        """The group of a sequence. It is asked when the sequence comes into the queue."""
        ...


class PrefillPolicy(Protocol):
    """Decides what engines prefill next. It may be `Ranked` and `Grouped`."""

    def plan(
        self, waiting: SequenceQueue, engines: Seq[EngineView], now: float
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
      router, placement: of the deployment; None where one of them is constructed itself.
    """

    config: Config
    router: Router | None = None
    placement: PlacementPolicy | None = None


@dataclass(frozen=True)
class Policies:
    """The policies of a deployment."""

    prefill: PrefillPolicy
    decode: DecodePolicy
    handoff: HandoffPolicy
    router: Router
    placement: PlacementPolicy
    admission: AdmissionPolicy
    eviction: EvictionPolicy
    tiering: TieringPolicy
    roles: RolePolicy
