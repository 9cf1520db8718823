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

from collections.abc import Callable, Iterator, Mapping
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from pdjax.core.kv_layout import NULL_PAGE
from pdjax.host.batching.buckets import Buckets, fit, padded
from pdjax.host.batching.flights import Aboard, Course, Flight, Occupants, largest
from pdjax.host.batching.masked_rows import MaskedRows
from pdjax.host.batching.sampling_rows import SamplingRows
from pdjax.host.sequences.reference import SequenceRef
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.batches import IDLE_ROW, USE_FED_BACK, DecodeBatch


class Tick(NamedTuple):
    """A tick to dispatch, and its sequences.

    Attributes:
      batch: what goes through the door.
      leaving: the sequences whose next tokens the ticket will hold, each with its entry there.
      refs: the sequences under all stages; `ids` for a reader.
      stages_active: stages with a sequence under them.
    """

    batch: DecodeBatch
    leaving: tuple[tuple[int, SequenceRef], ...]
    refs: tuple[SequenceRef, ...]
    ids: str
    stages_active: int


class DecodePipeline:
    """Rows of a decode engine, and the sequences in them.

    With hundreds of rows a tick must not cost the host a loop over them. So arrays hold what is
    known of each row, and all of a tick but the positions is kept until it changes. A tick has
    entries for the rows that are launched alone, in the order of their places; see `DecodeBatch`.

    Args:
      stages: R, which is also the number of microbatches.
      rows: R * b.
      buckets: entries of a tick, widths of the page table, and the size of a page.
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
        self._shapes = buckets.tick_shapes(self._size)
        self._sizes = tuple(self._shapes)
        self._mixed_shapes = buckets.mixed_rows(self._size)
        self._next = np.zeros(shape, np.int32)  # [R, b]: position of the token that goes in next
        # [R, b]: the last such; before `next`: no sequence, or its newest token is not known yet.
        self._last = np.full(shape, -1, np.int32)
        self._tables = np.full((*shape, buckets.table_pages[-1]), NULL_PAGE, np.int32)
        self._widths = np.zeros(shape, np.int32)  # [R, b]: pages of a row's table in use
        # By n, the tokens of a tick at which no row joins.
        self._fed_back = {n: np.full(n, USE_FED_BACK, np.int32) for n in self._sizes}
        self._sampling = [SamplingRows(self._size) for _ in range(stages)]
        self._refs: dict[int, SequenceRef] = {}  # by row
        self._new: list[set[int]] = [set() for _ in range(stages)]  # places not yet launched
        self._masked = MaskedRows(stages)
        self._occupants: list[Occupants | None] = [None] * stages  # None: to be made
        self._flights: list[Flight | None] = [None] * stages  # None: no row is in flight
        self._courses: list[Course | None] = [None] * stages  # None: the next launch may differ
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
        self._leave_course(row // self._size)
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
        assert row in self._taken and row not in self._refs, f"row {row} is not reserved"
        microbatch, i = place = self._place(row)
        self._refs[row] = SequenceRef.of(sequence)
        self._next[place] = position  # the KV of the last token that it may have is never read
        self._new[microbatch].add(i)
        self._copy_pages(place, pages)

    def resume(self, row: int) -> None:
        """Launch a row with a mask again: the host knows its newest token."""
        microbatch, i = place = self._place(row)
        self._leave_course(microbatch)
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
        self._refs.pop(row, None)
        if row == self.ahead:
            self.ahead = None
        microbatch, i = place = self._place(row)
        heappush(self._free[microbatch], i)
        self._new[microbatch].discard(i)
        self._masked.release(microbatch, i)
        self._occupants[microbatch] = None
        self._leave_course(microbatch)
        self._next[place], self._last[place] = 0, -1
        self._tables[place] = NULL_PAGE
        self._widths[place] = 0
        self._sampling[microbatch].clear(i)
        flight = self._flights[microbatch]
        if flight is not None and (entry := flight.entry_of(i)) is not None:
            self._flights[microbatch] = flight.without(entry)
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
            for i in self._beyond_table(self._launchable(microbatch).nonzero()[0])
            for sequence in (self._sequence(microbatch, i),)
            if len(sequence.pages) * self._buckets.page_size <= self._next[microbatch, i]
        ]

    def tick(self, *, mixed: bool = False) -> Tick:
        """Launch every row that can be launched, and move each microbatch on by one stage.

        Args:
          mixed: whether the tick is a part of a mixed step.
        """
        microbatch = self.entering
        course = self._courses[microbatch]
        if course is None:
            flight = self._launch(microbatch)
        else:
            flight = course.next()
            if not course.left:
                self._leave_course(microbatch)
        self._flights[microbatch] = flight
        shapes = self._mixed_shapes if mixed else self._shapes
        return self._advance(self._known_tokens(microbatch, flight), shapes)

    def _launch(self, microbatch: int) -> Flight | None:
        """Let the rows enter that can be launched, where that may differ from the last time."""
        places = self._launchable(microbatch).nonzero()[0]
        if not places.size:
            return None
        for i in self._beyond_table(places):
            self._copy_pages((microbatch, i), self._sequence(microbatch, i).pages)
        following, widths = self._next[microbatch][places], self._widths[microbatch][places]
        n = fit(self._sizes, len(places))
        pages = fit(self._shapes[n], int(widths.max()))
        table = np.full((n, pages), NULL_PAGE, np.int32)
        table[: len(places)] = self._tables[microbatch, places, :pages]
        flight = Flight(
            self._occupants_of(microbatch, places),
            padded(places + microbatch * self._size, n, 0),
            padded(following, n, IDLE_ROW),
            table,
        )
        # How often the same rows can be launched again before anything else differs.
        self._next[microbatch][places] += 1
        held = widths * self._buckets.page_size - 1
        left = int((np.minimum(self._last[microbatch][places], held) - following).min())
        if left > 0:
            launched = (flight.positions != IDLE_ROW).astype(np.int32)
            self._courses[microbatch] = Course(flight, launched, left)
        return flight

    def _leave_course(self, microbatch: int) -> None:
        """The next launch of a microbatch may differ from the last one. Only now it is noted how
        far the launches of its course have brought its rows, since each would cost an addition."""
        course, self._courses[microbatch] = self._courses[microbatch], None
        if course is not None:
            self._next[microbatch][course.flight.occupants.places] += course.launches

    def _known_tokens(self, microbatch: int, flight: Flight | None) -> dict[int, int]:
        """By their entries, the inputs of rows that the device has not kept: of those that enter
        for the first time in their row, and of those with a mask."""
        tokens, new, masked = {}, self._new[microbatch], self._masked.of(microbatch)
        for i in sorted(new):
            sequence = self._sequence(microbatch, i)
            self._sampling[microbatch].fill(i, sequence)
            entry = None if flight is None else flight.entry_of(i)
            if entry is not None and microbatch * self._size + i != self.ahead:
                tokens[entry] = sequence.output[-1]
        new.clear()
        for i in masked:
            entry = None if flight is None else flight.entry_of(i)
            if entry is not None:
                sequence = self._sequence(microbatch, i)
                tokens[entry] = sequence.output[-1]
                self._masked.launch(microbatch, i, sequence)
        return tokens

    def shapes(self) -> Iterator[tuple[int, int]]:
        """Every (n, W) that a tick may have."""
        return ((n, pages) for n, widths in self._shapes.items() for pages in widths)

    def mixed_shapes(self) -> Iterator[tuple[int, int]]:
        """Every (n, W) of the rows of a mixed step."""
        return ((n, pages) for n, widths in self._mixed_shapes.items() for pages in widths)

    def idle_tick(self, rows: int, table_pages: int) -> DecodeBatch:
        """A tick of that bucket, for an empty pipeline."""
        assert not self._taken, "a sequence would miss a tick"
        return self._advance({}, {rows: (table_pages,)}).batch

    def _advance(self, known: dict[int, int], shapes: Mapping[int, tuple[int, ...]]) -> Tick:
        """The next tick, with every row where it is now.

        Args:
          known: inputs by their entries; of other entries the device has kept them.
          shapes: the n that it may have, and the W of each.
        """
        number, self._next_tick = self._next_tick, self._next_tick + 1
        under = self._under[number % self.stages]
        flights = [self._flights[microbatch] for microbatch in under]
        leaving, left, masks = under[-1], flights[-1], None
        if left is not None and self.stages == 1 and shapes is self._shapes:
            aboard = Aboard.alone(left)
        else:
            n, pages = largest(flights)
            n = fit(tuple(shapes), n)
            aboard = Aboard.of(flights, n, fit(shapes[n], pages))
        tokens = self._fed_back[aboard.rows.shape[1]]
        if known:
            tokens = tokens.copy()
            tokens[list(known)] = list(known.values())
        if left is not None:
            masks = self._masked.leave(leaving, left.occupants.places)
            self._flights[leaving] = None
        sampling = self._sampling[leaving].take()
        return Tick(
            DecodeBatch(number, tokens, *aboard[:3], sampling, masks),
            left.occupants.entries if left is not None else (),
            *aboard[3:],
        )

    def _occupants_of(self, microbatch: int, places: np.ndarray) -> Occupants:
        """The sequences at some places of a microbatch; the same object until one joins or
        leaves."""
        occupants = self._occupants[microbatch]
        if occupants is None or not np.array_equal(occupants.places, places):
            first = microbatch * self._size
            refs = [self._refs[first + i] for i in places.tolist()]
            occupants = Occupants.of(places, tuple(enumerate(refs)))
            self._occupants[microbatch] = occupants
        return occupants

    @property
    def _any_in_flight(self) -> bool:
        return any(self._flights)

    def _launchable(self, microbatch: int) -> np.ndarray:
        """bool[b]: rows with a token left to be launched for."""
        return self._next[microbatch] <= self._last[microbatch]

    def _beyond_table(self, places: np.ndarray) -> list[int]:
        """Those of some places, in the microbatch that enters, that would write past their page
        table."""
        microbatch = self.entering
        held = self._widths[microbatch][places] * self._buckets.page_size
        return places[held <= self._next[microbatch][places]].tolist()

    def _copy_pages(self, place: tuple[int, int], pages: list[int]) -> None:
        """Bring a row's table up to date with the pages that its sequence has been given."""
        filled = self._widths[place]
        self._tables[place][filled : len(pages)] = pages[filled:]
        self._widths[place] = len(pages)

    def _sequence(self, microbatch: int, i: int) -> Sequence:
        return self._refs[microbatch * self._size + i].sequence

    def _place(self, row: int) -> tuple[int, int]:
        """Microbatch of a row, and its place there."""
        return divmod(row, self._size)
