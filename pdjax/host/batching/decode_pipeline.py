"""The rotation of microbatches over the stages of a decode engine, as the host keeps it.

An engine of R stages has R microbatches of b rows. Row r belongs to microbatch `r // b` and joins,
once somebody sits in it, when that microbatch next enters stage 0. From then on it is launched each
time that its microbatch enters, until it has been launched for all the tokens it may have; whoever
sits in it can leave at any tick.

Since each tick names the rows under all R stages, and there are R microbatches, every row is under
exactly one stage. So the host keeps one array over all rows, and a tick is a permutation of it.
"""

from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain

import numpy as np

from pdjax.core.kv_layout import NULL_PAGE
from pdjax.host.batching.buckets import Buckets, fit
from pdjax.host.batching.sampling_rows import SamplingRows
from pdjax.host.sequences.reference import Member
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.batches import IDLE_ROW, USE_FED_BACK, DecodeBatch


@dataclass(frozen=True)
class Tick:
    """A tick to dispatch, and whom it concerns.

    Attributes:
      batch: what goes through the door.
      leaving: whose next token the ticket will hold, and in which of its rows, 0 <= row < b.
      aboard: everybody under any stage.
      stages_active: stages with somebody under them.
    """

    batch: DecodeBatch
    leaving: tuple[tuple[int, Member], ...]
    aboard: tuple[Member, ...]
    stages_active: int


@dataclass(frozen=True)
class _Crew:
    """Who is on the way in a microbatch: `rows` with their places in it, where `flying` is true."""

    flying: np.ndarray  # bool[b]
    rows: tuple[tuple[int, Member], ...]
    members: tuple[Member, ...]


class Pipeline:
    """Rows of a decode engine, and who is where in its stages.

    With hundreds of rows a tick must not cost the host a loop over them, so what is known of each
    row stands in arrays, and the tuples of a tick are made anew only when somebody comes or goes.

    Args:
      stages: R, which is also the number of microbatches.
      rows: R * b.
      buckets: widths of the page table, and the size of a page.
    """

    def __init__(self, stages: int, rows: int, buckets: Buckets) -> None:
        self.stages, self.rows, self._buckets = stages, rows, buckets
        self._size = rows // stages  # b
        ticks = np.arange(stages)
        self._under = (ticks[:, None] - ticks) % stages  # [R, R]: microbatch under each stage
        shape = stages, self._size
        self._positions = np.full(shape, IDLE_ROW, np.int32)  # [R, b]: in flight
        self._next = np.zeros(shape, np.int32)  # [R, b]: position of the token that goes in next
        self._last = np.full(shape, -1, np.int32)  # [R, b]: the last such; before `next`: nobody
        self._tables = np.full((*shape, buckets.table_pages[-1]), NULL_PAGE, np.int32)
        self._widths = np.zeros(shape, np.int32)  # [R, b]: pages of a row's table in use
        self._sampling = [SamplingRows(self._size) for _ in range(stages)]
        self._members: list[Member | None] = [None] * rows
        self._new: list[set[int]] = [set() for _ in range(stages)]  # places not yet launched
        self._crews: list[_Crew | None] = [None] * stages  # None: not known any longer
        self._free = [list(range(self._size)) for _ in range(stages)]  # heaps of places
        self._taken: set[int] = set()
        self._next_tick = 0

    @property
    def taken_rows(self) -> int:
        """Rows that are used or reserved."""
        return len(self._taken)

    @property
    def entering(self) -> int:
        """The microbatch that enters at the next tick."""
        return self._next_tick % self.stages

    @property
    def active(self) -> bool:
        """Whether a tick would do anything: somebody is on the way, or could be launched."""
        return bool((self._next <= self._last).any()) or self._anybody_flies

    def reserve(self) -> int:
        """Take a free row, in the microbatch with the fewest taken."""
        # The first of equals.
        microbatch = max(range(self.stages), key=lambda m: len(self._free[m]))
        row = microbatch * self._size + heappop(self._free[microbatch])
        self._taken.add(row)
        return row

    def seat(self, row: int, sequence: Sequence) -> None:
        """Let `sequence` decode in a reserved row."""
        assert row in self._taken and self._members[row] is None, f"row {row} is not reserved"
        microbatch, i = place = self._place(row)
        self._members[row] = Member.of(sequence)
        # The newest token goes in next; of the last one that it may have, nothing is read.
        self._next[place] = sequence.length - 1
        self._last[place] = sequence.lifetime_tokens - 1
        assert self._next[place] <= self._last[place], f"{sequence.id} has no token left to get"
        self._new[microbatch].add(i)
        self._copy_pages(place, sequence)

    def drop(self, row: int) -> None:
        """Give up a row; whatever is on the way in it is idle from the next tick on."""
        self._taken.remove(row)
        self._members[row] = None
        microbatch, i = place = self._place(row)
        heappush(self._free[microbatch], i)
        self._new[microbatch].discard(i)
        self._crews[microbatch] = None
        self._positions[place] = IDLE_ROW
        self._next[place], self._last[place] = 0, -1
        self._tables[place] = NULL_PAGE
        self._widths[place] = 0
        self._sampling[microbatch].clear(i)

    def align(self) -> None:
        """Where nobody is on the way, go straight to the microbatch that somebody waits to enter
        with: the ticks between would move nothing."""
        if self.stages > 1 and not self._anybody_flies:
            waiting = np.flatnonzero((self._next <= self._last).any(axis=1))  # microbatches
            if waiting.size:
                self._next_tick += int(((waiting - self.entering) % self.stages).min())

    def joining(self) -> list[Sequence]:
        """Who enters at the next tick for the first time in his row."""
        microbatch = self.entering
        return [self._sequence(microbatch, i) for i in sorted(self._new[microbatch])]

    def needy(self) -> list[Sequence]:
        """Who enters at the next tick, and has no page yet for the position that he writes."""
        microbatch = self.entering
        return [
            sequence
            for i in self._beyond_table(self._launchable(microbatch))
            for sequence in (self._sequence(microbatch, i),)
            if len(sequence.pages) * self._buckets.table_page_size <= self._next[microbatch, i]
        ]

    def tick(self) -> Tick:
        """Launch who can be launched, and move every microbatch on by one stage."""
        microbatch = self.entering
        launched = self._launchable(microbatch)
        tokens = np.full(self._size, USE_FED_BACK, np.int32)
        for i in sorted(self._new[microbatch]):
            sequence = self._sequence(microbatch, i)
            tokens[i] = sequence.output[-1]
            self._sampling[microbatch].fill(i, sequence)
        self._new[microbatch].clear()
        for i in self._beyond_table(launched):
            self._copy_pages((microbatch, i), self._sequence(microbatch, i))
        self._positions[microbatch] = np.where(launched, self._next[microbatch], IDLE_ROW)
        self._next[microbatch] += launched
        widest = int(self._widths.max(where=self._positions != IDLE_ROW, initial=1))
        return self._advance(tokens, fit(self._buckets.table_pages, widest))

    def idle_tick(self, table_pages: int) -> DecodeBatch:
        """A tick of that bucket, for an empty pipeline."""
        assert not self._taken, "somebody would miss a tick"
        tokens = np.full(self._size, USE_FED_BACK, np.int32)
        return self._advance(tokens, table_pages).batch

    def _advance(self, tokens: np.ndarray, table_pages: int) -> Tick:
        """The next tick, with everybody where he is now."""
        number, self._next_tick = self._next_tick, self._next_tick + 1
        under = self._under[number % self.stages]
        leaving = int(under[-1])
        positions = self._positions[under]  # indexing by an array copies
        page_table = np.empty((*positions.shape, table_pages), np.int32)
        for stage, microbatch in enumerate(under.tolist()):
            page_table[stage] = self._tables[microbatch, :, :table_pages]
        page_table[positions == IDLE_ROW] = NULL_PAGE
        sampling = self._sampling[leaving].take()
        crews = [self._crew(microbatch) for microbatch in range(self.stages)]
        self._positions[leaving] = IDLE_ROW
        return Tick(
            batch=DecodeBatch(number, tokens, positions, page_table, sampling),
            leaving=crews[leaving].rows,
            aboard=tuple(chain.from_iterable(crew.members for crew in crews)),
            stages_active=sum(bool(crew.members) for crew in crews),
        )

    def _crew(self, microbatch: int) -> _Crew:
        """Who is on the way in a microbatch; the same object until somebody comes or goes."""
        flying, crew = self._positions[microbatch] != IDLE_ROW, self._crews[microbatch]
        if crew is None or (crew.flying != flying).any():
            first = microbatch * self._size
            rows = tuple(
                (i, member)
                for i in np.flatnonzero(flying).tolist()
                if (member := self._members[first + i]) is not None
            )
            crew = _Crew(flying, rows, tuple(member for _, member in rows))
            self._crews[microbatch] = crew
        return crew

    @property
    def _anybody_flies(self) -> bool:
        return bool((self._positions != IDLE_ROW).any())

    def _launchable(self, microbatch: int) -> np.ndarray:
        """bool[b]: who has a token left to be launched for."""
        return self._next[microbatch] <= self._last[microbatch]

    def _beyond_table(self, launched: np.ndarray) -> list[int]:
        """Who of `launched` bool[b], in the microbatch that enters, would write past his table."""
        microbatch = self.entering
        held = self._widths[microbatch] * self._buckets.table_page_size
        return (launched & (held <= self._next[microbatch])).nonzero()[0].tolist()

    def _copy_pages(self, place: tuple[int, int], sequence: Sequence) -> None:
        """Bring a row's table up to date with the pages that its sequence has been given."""
        filled, pages = self._widths[place], sequence.pages
        self._tables[place][filled : len(pages)] = pages[filled:]
        self._widths[place] = len(pages)

    def _sequence(self, microbatch: int, i: int) -> Sequence:
        member = self._members[microbatch * self._size + i]
        assert member is not None, f"nobody sits in row {i} of microbatch {microbatch}"
        return member.sequence

    def _place(self, row: int) -> tuple[int, int]:
        """Microbatch of a row, and its place there."""
        return divmod(row, self._size)
