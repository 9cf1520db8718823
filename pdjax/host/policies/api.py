"""What a policy is: pure functions from what the host knows to a plan. Nothing moves until the
coordinator carries a plan out, so a policy can be tried on made-up situations."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from pdjax.host.batching.chunks import Chunk
from pdjax.host.sequences.sequence import Sequence


@dataclass(frozen=True)
class PrefillView:
    """A prefill engine, as its scheduler sees it.

    Attributes:
      engine: its index.
      open: whether it takes another step now.
      running: its sequences with tokens still to dispatch, oldest first.
      backlog: tokens that it holds and has not finished: the measure of its load.
      free_pages: pages that may be reserved now.
      total_pages: pages that it will ever have.
      cached: of a sequence that waits, the tokens at its front whose KV is there already.
      steps: that it has been given so far.
    """

    engine: int
    open: bool
    running: tuple[Sequence, ...]
    backlog: int
    free_pages: int
    total_pages: int
    cached: Callable[[Sequence], int]
    steps: int = 0


@dataclass(frozen=True)
class PrefillPlan:
    """One step of a prefill engine. Sequences of it that are WAITING are admitted by it: pages for
    all their tokens are reserved."""

    engine: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class DecodeView:
    """A decode engine, as its scheduler sees it.

    Attributes:
      engine: its index.
      rows: of its batch, all of them; `free_rows`: those that nobody holds.
      free_pages: pages that may be reserved now.
      total_pages: pages that it will ever have.
      shares_with: prefill engines that keep their pages in the same pool.
    """

    engine: int
    rows: int
    free_rows: int
    free_pages: int
    total_pages: int
    shares_with: frozenset[int]


@dataclass(frozen=True)
class Migration:
    """A sequence that decodes is to go on on another decode engine."""

    sequence: Sequence
    engine: int


@dataclass(frozen=True)
class Admission:
    """A sequence is to be handed to a decode engine. `pages` are reserved there; 0 where it brings
    its own."""

    sequence: Sequence
    engine: int
    pages: int


@dataclass(frozen=True)
class GrowthPlan:
    """First all `victims` give up their pages, to be prefilled anew; then each of `grown` gets one
    more page."""

    victims: tuple[Sequence, ...]
    grown: tuple[Sequence, ...]


class Router(Protocol):
    """Chooses among engines that can all take the sequence now."""

    def prefill_engine(self, sequence: Sequence, engines: Seq[PrefillView]) -> PrefillView:
        """Where it is prefilled."""
        ...

    def decode_engine(self, sequence: Sequence, engines: Seq[DecodeView]) -> DecodeView:
        """Where it is decoded."""
        ...


class PrefillScheduler(Protocol):
    """Decides what the prefill engines compute next."""

    def plan(self, waiting: Seq[Sequence], engines: Seq[PrefillView]) -> list[PrefillPlan]:
        """At most one step for each open engine."""
        ...


class DecodeScheduler(Protocol):
    """Decides who decodes."""

    def grow(self, needy: Seq[Sequence], holders: Seq[Sequence], free_pages: int) -> GrowthPlan:
        """Find a page for each of `needy`, who cannot enter the next tick without one.

        Args:
          needy: in any order; they are among the holders.
          holders: sequences that hold pages of the pool and can give them up at once.
          free_pages: of the pool.
        """
        ...

    def admit(self, prefilled: Seq[Sequence], engines: Seq[DecodeView]) -> list[Admission]:
        """Who of `prefilled`, oldest first, is handed over now, and where to.

        It is also asked who of those whose prefill is about to be dispatched gets room ahead, so
        that his KV can leave meanwhile; but only when nobody prefilled waits for room.
        """
        ...


class HandoffScheduler(Protocol):
    """Decides whether KV moves, when and where to."""

    def stays(self, sequence: Sequence) -> bool:
        """Whether a sequence that has just been given a token by its prefill engine makes the next
        one there, too. The prefill side's pages may run out: then it is handed over anyway."""
        ...

    def streams(self, sequence: Sequence) -> bool:
        """Whether the KV of one that is prefilled may leave before that has ended."""
        ...

    def gives_back(self, sequence: Sequence) -> bool:
        """Whether the KV of one that has finished goes back to the prefill side."""
        ...

    def migrations(
        self, engines: Seq[DecodeView], decoding: Mapping[int, Seq[Sequence]]
    ) -> list[Migration]:
        """Who leaves his decode engine for another; asked while nobody is between two of them.

        Args:
          engines: all of them.
          decoding: who decodes on each.
        """
        ...
