"""The rotation of microbatches over the stages of a decode engine, as the host keeps it.

An engine of R stages has R microbatches of b rows. Row r belongs to microbatch `r // b`. A sequence
that is assigned to a row joins when that microbatch next enters stage 0. From then on it is
launched each time that its microbatch enters, until it has been launched for all the tokens that it
may have; its row can be released at any tick.

A row may run ahead: its first input is then a token that the host does not know yet.

A row with a mask is launched only when the host knows its last token, which decides the mask of the
next. So it sits out the entries in between, while its neighbours go on.

Since each tick names the rows under all R stages, and there are R microbatches, every row is under
exactly one stage. So the host keeps one array over all rows, and a tick is a permutation of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain
from typing import NamedTuple

import numpy as np

from pdjax.core.kv_layout import NULL_PAGE
from pdjax.host.batching.buckets import Buckets, fit
from pdjax.host.batching.masked_rows import MaskedRows
from pdjax.host.batching.sampling_rows import SamplingRows
from pdjax.host.sequences.reference import SequenceRef, ids_of
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.batches import IDLE_ROW, USE_FED_BACK, DecodeBatch

_EVER = np.iinfo(np.int32).max


class Tick(NamedTuple):
    """A tick to dispatch, and its sequences.

    Attributes:
      batch: what goes through the door.
      leaving: the sequences whose next tokens the ticket will hold, each with its row there, 0 <=
        row < b.
      refs: the sequences under all stages; `ids` for a reader.
      stages_active: stages with a sequence under them.
    """

    batch: DecodeBatch
    leaving: tuple[tuple[int, SequenceRef], ...]
    refs: tuple[SequenceRef, ...]
    ids: str
    stages_active: int


class _Occupants(NamedTuple):
    """The sequences in flight in a microbatch: `rows` with their places, as `in_flight` says."""

    in_flight: np.ndarray  # bool[b]
    rows: tuple[tuple[int, SequenceRef], ...]
    refs: tuple[SequenceRef, ...]
    ids: str


class _Flight(NamedTuple):
    """A microbatch that has been launched: its occupants, and their page table."""

    occupants: _Occupants
    table: np.ndarray  # i32[b, W], null where no row is in flight; W is a bucket
    pages: int  # W


@dataclass
class _Course:
    """Launches of a microbatch that differ in the positions alone: until a row joins or leaves,
    needs a page, or has been launched for its last token."""

    flight: _Flight
    launched: np.ndarray  # i32[b], 1 for each row that is launched
    positions: np.ndarray  # i32[b], of the launch before
    entries: int  # that are left


class DecodePipeline:
    """Rows of a decode engine, and the sequences in them.

    With hundreds of rows a tick must not cost the host a loop over them. So arrays hold what is
    known of each row, and all of a tick but the positions is kept until it changes.

    Args:
      stages: R, which is also the number of microbatches.
      rows: R * b.
      buckets: widths of the page table, and the size of a page.
      on_change: called when a row is taken, assigned, resumed or released.

    Attributes:
      ahead: the row that runs ahead, if any. No tick may be read then.
    """

    def __init__(
        self, stages: int, rows: int, buckets: Buckets, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self.stages, self.rows, self._buckets = stages, rows, buckets
        self.ahead: int | None = None
        self._on_change = on_change
        self._size = rows // stages  # b
        # [R, R]: the microbatch under each stage.
        self._under = [
            [(tick - stage) % stages for stage in range(stages)] for tick in range(stages)
        ]
        shape = stages, self._size
        self._idle = np.full(self._size, IDLE_ROW, np.int32)
        self._positions = [self._idle] * stages  # i32[b] each: in flight; never written in place
        self._next = np.zeros(shape, np.int32)  # [R, b]: position of the token that goes in next
        # [R, b]: the last such; before `next`: no sequence, or its newest token is not known yet.
        self._last = np.full(shape, -1, np.int32)
        self._tables = np.full((*shape, buckets.table_pages[-1]), NULL_PAGE, np.int32)
        self._widths = np.zeros(shape, np.int32)  # [R, b]: pages of a row's table in use
        self._fed_back = np.full(self._size, USE_FED_BACK, np.int32)  # tokens, where no row joins
        self._sampling = [SamplingRows(self._size) for _ in range(stages)]
        self._refs: list[SequenceRef | None] = [None] * rows
        self._new: list[set[int]] = [set() for _ in range(stages)]  # places not yet launched
        self._masked = MaskedRows(stages)
        self._occupants: list[_Occupants | None] = [None] * stages  # None: to be made
        self._flights: list[_Flight | None] = [None] * stages  # None: no row is in flight
        self._courses: list[_Course | None] = [None] * stages  # None: the next launch may differ
        self._free = [list(range(self._size)) for _ in range(stages)]  # heaps of places
        self._taken: set[int] = set()
        self._next_tick = 0

    @property
    def taken_rows(self) -> int:
        """Rows that are assigned or reserved."""
        return len(self._taken)

    @property
    def entering(self) -> int:
        """The microbatch that enters at the next tick."""
        return self._next_tick % self.stages

    @property
    def active(self) -> bool:
        """Whether a tick would do anything: a sequence is in flight, or could be launched."""
        if any(self._courses) or self._any_in_flight:
            return True
        return bool(self._taken) and bool((self._next <= self._last).any())

    def reserve(self) -> int:
        """Take a free row, in the microbatch with the fewest taken."""
        # The first of equals.
        microbatch = max(range(self.stages), key=lambda m: len(self._free[m]))
        row = microbatch * self._size + heappop(self._free[microbatch])
        self._taken.add(row)
        self._on_change()
        return row

    def assign(self, row: int, sequence: Sequence) -> None:
        """Let a sequence decode in a reserved row, from when its microbatch next enters. A row that
        runs ahead goes on."""
        assert sequence.behind or sequence.tokens_left > 0, f"{sequence.id} has no token left"
        if row == self.ahead:
            self.ahead = None
        else:
            self._begin(row, sequence, sequence.length - 1, sequence.pages)
        self._courses[row // self._size] = None
        self._bound(self._place(row), sequence)
        self._on_change()

    def run_ahead(self, row: int, sequence: Sequence, pages: list[int]) -> None:
        """Let the only row that is reserved begin with the token after those of a sequence, and go
        on for as long as `pages` last. `assign` follows when the host knows that token."""
        assert self._taken == {row}, f"others wait for what row {row} waits for"
        self.ahead = row
        self._begin(row, sequence, sequence.length, pages)
        held = len(pages) * self._buckets.page_size
        self._last[self._place(row)] = min(sequence.lifetime_tokens, held) - 1
        self._on_change()

    def _begin(self, row: int, sequence: Sequence, position: int, pages: list[int]) -> None:
        assert row in self._taken and self._refs[row] is None, f"row {row} is not reserved"
        microbatch, i = place = self._place(row)
        self._refs[row] = SequenceRef.of(sequence)
        self._next[place] = position  # the KV of the last token that it may have is never read
        self._new[microbatch].add(i)
        self._copy_pages(place, pages)

    def resume(self, row: int) -> None:
        """Launch a row with a mask again: the host knows its newest token."""
        microbatch, i = place = self._place(row)
        self._courses[microbatch] = None
        self._bound(place, self._sequence(microbatch, i))
        self._on_change()

    def _bound(self, place: tuple[int, int], sequence: Sequence) -> None:
        """Set how far a row may be launched: of one with a mask, for one token once it is known."""
        if sequence.behind:
            self._last[place] = self._next[place] - 1
            self._masked.add(*place)
        elif sequence.mask is None:
            self._last[place] = sequence.lifetime_tokens - 1
        else:
            self._last[place] = self._next[place]
            self._masked.add(*place)

    def release(self, row: int) -> None:
        """Give up a row; what is in flight in it is idle from the next tick on."""
        self._taken.remove(row)
        self._refs[row] = None
        if row == self.ahead:
            self.ahead = None
        microbatch, i = place = self._place(row)
        heappush(self._free[microbatch], i)
        self._new[microbatch].discard(i)
        self._masked.release(microbatch, i)
        self._occupants[microbatch] = self._courses[microbatch] = None
        self._next[place], self._last[place] = 0, -1
        self._tables[place] = NULL_PAGE
        self._widths[place] = 0
        self._sampling[microbatch].clear(i)
        if self._flights[microbatch] is not None:
            positions = self._positions[microbatch].copy()
            positions[i] = IDLE_ROW
            self._positions[microbatch] = positions
            self._flights[microbatch] = self._flight(microbatch)
        self._on_change()

    def align(self) -> None:
        """With nothing in flight, go straight to the next microbatch in which a sequence waits to
        enter: the ticks before it would move nothing."""
        if self.stages > 1 and not self._any_in_flight:
            waiting = np.flatnonzero((self._next <= self._last).any(axis=1))  # microbatches
            if waiting.size:
                self._next_tick += int(((waiting - self.entering) % self.stages).min())

    def joining(self) -> list[Sequence]:
        """The sequences that enter at the next tick for the first time in their row."""
        microbatch = self.entering
        new = self._new[microbatch]
        return [self._sequence(microbatch, i) for i in sorted(new)] if new else []

    def needing_page(self) -> list[Sequence]:
        """The sequences that enter at the next tick and lack a page for the position written."""
        microbatch = self.entering
        if self._courses[microbatch] is not None:
            return []
        return [
            sequence
            for i in self._beyond_table(self._launchable(microbatch))
            for sequence in (self._sequence(microbatch, i),)
            if len(sequence.pages) * self._buckets.page_size <= self._next[microbatch, i]
        ]

    def tick(self) -> Tick:
        """Launch every row that can be launched, and move each microbatch on by one stage."""
        microbatch = self.entering
        tokens, new, masked = self._fed_back, self._new[microbatch], self._masked.of(microbatch)
        if new or masked:
            tokens = tokens.copy()
            for i in sorted(new):
                sequence = self._sequence(microbatch, i)
                if microbatch * self._size + i != self.ahead:
                    tokens[i] = sequence.output[-1]
                self._sampling[microbatch].fill(i, sequence)
            new.clear()
            for i in masked:
                if self._next[microbatch, i] <= self._last[microbatch, i]:
                    sequence = self._sequence(microbatch, i)
                    tokens[i] = sequence.output[-1]
                    self._masked.launch(microbatch, i, sequence)
        self._launch(microbatch)
        flights = [flight.pages for flight in self._flights if flight is not None]
        return self._advance(tokens, max(flights, default=self._buckets.table_pages[0]))

    def _launch(self, microbatch: int) -> None:
        """Let a microbatch enter."""
        course, following = self._courses[microbatch], self._next[microbatch]
        if course is not None:
            launched = course.launched
            course.positions = course.positions + launched  # an idle row stays where it is
            self._positions[microbatch], self._flights[microbatch] = course.positions, course.flight
            course.entries -= 1
            if not course.entries:
                self._courses[microbatch] = None
        else:
            able = self._launchable(microbatch)
            for i in self._beyond_table(able):
                self._copy_pages((microbatch, i), self._sequence(microbatch, i).pages)
            launched = able.astype(np.int32)
            self._positions[microbatch] = np.where(able, following, IDLE_ROW)
            self._flights[microbatch] = self._flight(microbatch)
            self._begin_course(microbatch, able, launched)
        following += launched

    def _begin_course(self, microbatch: int, able: np.ndarray, launched: np.ndarray) -> None:
        """Work out how often a microbatch that has just been launched can be launched the same way
        again. Its rows' `next` are still those of this launch."""
        flight, positions = self._flights[microbatch], self._positions[microbatch]
        if flight is not None:
            held = self._widths[microbatch] * self._buckets.page_size - 1
            last = np.minimum(self._last[microbatch], held)
            entries = int((last - positions).min(where=able, initial=_EVER))
            if entries > 0:
                self._courses[microbatch] = _Course(flight, launched, positions, entries)

    def idle_tick(self, table_pages: int) -> DecodeBatch:
        """A tick of that bucket, for an empty pipeline."""
        assert not self._taken, "a sequence would miss a tick"
        return self._advance(self._fed_back, table_pages).batch

    def _advance(self, tokens: np.ndarray, table_pages: int) -> Tick:
        """The next tick, with every row where it is now."""
        number, self._next_tick = self._next_tick, self._next_tick + 1
        under = self._under[number % self.stages]
        leaving = under[-1]
        if self.stages == 1:
            positions = self._positions[leaving][None]
        else:
            positions = np.stack([self._positions[microbatch] for microbatch in under])
        aboard = [flight.occupants for flight in self._flights if flight is not None]
        flights = [self._flights[microbatch] for microbatch in under]
        left = flights[-1]
        if self.stages == 1 and left is not None and left.pages == table_pages:
            page_table = left.table[None]
        else:
            page_table = np.full((*positions.shape, table_pages), NULL_PAGE, np.int32)
            for stage, flight in enumerate(flights):
                if flight is not None:
                    page_table[stage, :, : flight.pages] = flight.table
        masks = None
        if left is not None:
            masks = self._masked.leave(leaving)
            self._flights[leaving] = None
            self._positions[leaving] = self._idle
        if len(aboard) == 1:
            refs, ids = aboard[0].refs, aboard[0].ids
        else:
            refs = tuple(chain.from_iterable(occupants.refs for occupants in aboard))
            ids = ids_of(refs)
        return Tick(
            batch=DecodeBatch(
                number, tokens, positions, page_table, self._sampling[leaving].take(), masks
            ),
            leaving=left.occupants.rows if left is not None else (),
            refs=refs,
            ids=ids,
            stages_active=len(aboard),
        )

    def _flight(self, microbatch: int) -> _Flight | None:
        """The rows of a microbatch that are in flight; None where there is none."""
        in_flight = self._positions[microbatch] != IDLE_ROW
        if not in_flight.any():
            return None
        widest = int(self._widths[microbatch].max(where=in_flight, initial=1))
        pages = fit(self._buckets.table_pages, widest)
        table = np.where(in_flight[:, None], self._tables[microbatch, :, :pages], NULL_PAGE)
        return _Flight(self._occupants_of(microbatch, in_flight), table, pages)

    def _occupants_of(self, microbatch: int, in_flight: np.ndarray) -> _Occupants:
        """The sequences in flight in a microbatch; the same object until one joins or leaves."""
        occupants = self._occupants[microbatch]
        if occupants is None or (occupants.in_flight != in_flight).any():
            first = microbatch * self._size
            rows = tuple(
                (i, ref)
                for i in np.flatnonzero(in_flight).tolist()
                if (ref := self._refs[first + i]) is not None
            )
            refs = tuple(ref for _, ref in rows)
            occupants = _Occupants(in_flight, rows, refs, ids_of(refs))
            self._occupants[microbatch] = occupants
        return occupants

    @property
    def _any_in_flight(self) -> bool:
        return any(self._flights)

    def _launchable(self, microbatch: int) -> np.ndarray:
        """bool[b]: rows with a token left to be launched for."""
        return self._next[microbatch] <= self._last[microbatch]

    def _beyond_table(self, launched: np.ndarray) -> list[int]:
        """Places of `launched` bool[b], in the microbatch that enters, that would write past their
        page table."""
        microbatch = self.entering
        held = self._widths[microbatch] * self._buckets.page_size
        return (launched & (held <= self._next[microbatch])).nonzero()[0].tolist()

    def _copy_pages(self, place: tuple[int, int], pages: list[int]) -> None:
        """Bring a row's table up to date with the pages that its sequence has been given."""
        filled = self._widths[place]
        self._tables[place][filled : len(pages)] = pages[filled:]
        self._widths[place] = len(pages)

    def _sequence(self, microbatch: int, i: int) -> Sequence:
        ref = self._refs[microbatch * self._size + i]
        assert ref is not None, f"row {i} of microbatch {microbatch} is free"
        return ref.sequence

    def _place(self, row: int) -> tuple[int, int]:
        """Microbatch of a row, and its place there."""
        return divmod(row, self._size)
