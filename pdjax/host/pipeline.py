"""The rotation of microbatches over the stages of a decode engine, as the host keeps it.

An engine of R stages has R microbatches of b rows. Row r belongs to microbatch `r // b` and joins,
once somebody sits in it, when that microbatch next enters stage 0. From then on it is launched each
time that its microbatch enters, until it has been launched for all the tokens it may have; whoever
sits in it can leave at any tick.

Since each tick names the rows under all R stages, and there are R microbatches, every row is under
exactly one stage. So the host keeps one array over all rows, and a tick is a permutation of it.
"""

from dataclasses import dataclass, field

import numpy as np

from pdjax.engine_api import IDLE_ROW, USE_FED_BACK, DecodeBatch
from pdjax.host.batch import Buckets, SamplingRows, fit
from pdjax.host.member import Member
from pdjax.kv_layout import NULL_PAGE
from pdjax.request import Sequence


@dataclass
class _Seat:
    """A row in use. `launched` counts output tokens that are harvested or on their way."""

    sequence: Sequence | None = None  # None while it is only reserved
    launched: int = 0
    joined: bool = False

    @property
    def launchable(self) -> bool:
        return self.sequence is not None and self.launched < self.sequence.max_new_tokens

    @property
    def position(self) -> int:
        """Of the token that goes in next: the newest one, harvested or on its way."""
        assert self.sequence is not None
        return self.sequence.prompt_len + self.launched - 1


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


@dataclass
class Pipeline:
    """Rows of a decode engine, and who is where in its stages.

    Attributes:
      stages: R, which is also the number of microbatches.
      rows: R * b.
    """

    stages: int
    rows: int
    buckets: Buckets
    _seats: dict[int, _Seat] = field(default_factory=dict)
    _next_tick: int = 0

    def __post_init__(self) -> None:
        shape = self.stages, self.rows // self.stages
        self._positions = np.full(shape, IDLE_ROW, np.int32)  # [R, b]: in flight
        self._tables = np.full((*shape, self.buckets.table_pages[-1]), NULL_PAGE, np.int32)
        self._widths = np.zeros(shape, np.int32)  # [R, b]: pages of a row's table in use
        self._sampling = SamplingRows(*shape)

    @property
    def taken_rows(self) -> int:
        """Rows that are used or reserved."""
        return len(self._seats)

    @property
    def entering(self) -> int:
        """The microbatch that enters at the next tick."""
        return self._next_tick % self.stages

    @property
    def active(self) -> bool:
        """Whether a tick would do anything: somebody is on the way, or could be launched."""
        flying = bool((self._positions != IDLE_ROW).any())
        return flying or any(seat.launchable for seat in self._seats.values())

    def reserve(self) -> int:
        """Take a free row, in the microbatch with the fewest taken."""
        rows = range(self.rows)
        taken = np.bincount([self._place(row)[0] for row in self._seats], minlength=self.stages)
        row = min(
            (row for row in rows if row not in self._seats),
            key=lambda row: (taken[self._place(row)[0]], row),
        )
        self._seats[row] = _Seat()
        return row

    def seat(self, row: int, sequence: Sequence) -> None:
        """Let `sequence` decode in a reserved row."""
        self._seats[row] = _Seat(sequence, launched=len(sequence.output))

    def drop(self, row: int) -> None:
        """Give up a row; whatever is on the way in it is idle from the next tick on."""
        del self._seats[row]
        place = self._place(row)
        self._positions[place] = IDLE_ROW
        self._tables[place] = NULL_PAGE
        self._widths[place] = 0
        self._sampling.clear(place)

    def align(self) -> None:
        """Where nobody is on the way, go straight to the microbatch that somebody waits to enter
        with: the ticks between would move nothing."""
        waiting = {self._place(row)[0] for row, seat in self._seats.items() if seat.launchable}
        if waiting and not (self._positions != IDLE_ROW).any():
            self._next_tick += min((m - self.entering) % self.stages for m in waiting)

    def to_launch(self) -> list[tuple[Sequence, int, bool]]:
        """Who enters at the next tick: sequence, the position that is written, whether it joins."""
        return [
            (seat.sequence, seat.position, not seat.joined)
            for _, seat in self._entering_seats()
            if seat.sequence is not None
        ]

    def tick(self) -> Tick:
        """Launch who can be launched, and move every microbatch on by one stage."""
        microbatch = self.entering
        tokens = np.full(self.rows // self.stages, USE_FED_BACK, np.int32)
        for i, seat in self._entering_seats():
            assert seat.sequence is not None
            place, pages = (microbatch, i), seat.sequence.pages
            if not seat.joined:
                tokens[i] = seat.sequence.output[-1]
                self._sampling.fill(place, seat.sequence)
                seat.joined = True
            filled = self._widths[place]
            self._tables[microbatch, i, filled : len(pages)] = pages[filled:]
            self._widths[place] = len(pages)
            self._positions[place] = seat.position
            seat.launched += 1
        widest = int(self._widths.max(where=self._positions != IDLE_ROW, initial=1))
        return self._advance(tokens, fit(self.buckets.table_pages, widest))

    def idle_tick(self, table_pages: int) -> DecodeBatch:
        """A tick of that bucket, for an empty pipeline."""
        assert not self._seats, "somebody would miss a tick"
        tokens = np.full(self.rows // self.stages, USE_FED_BACK, np.int32)
        return self._advance(tokens, table_pages).batch

    def _advance(self, tokens: np.ndarray, table_pages: int) -> Tick:
        """The next tick, with everybody where he is now."""
        number, self._next_tick = self._next_tick, self._next_tick + 1
        under = (number - np.arange(self.stages)) % self.stages  # microbatch under each stage
        positions = self._positions[under]  # indexing by an array copies
        page_table = self._tables[under, :, :table_pages]
        page_table[positions == IDLE_ROW] = NULL_PAGE
        leaving = int(under[-1])
        batch = DecodeBatch(number, tokens, positions, page_table, self._sampling.take(leaving))
        aboard = {}
        for row, seat in self._seats.items():
            place = self._place(row)
            if seat.sequence is not None and self._positions[place] != IDLE_ROW:
                aboard[place] = Member.of(seat.sequence)
        self._positions[leaving] = IDLE_ROW
        return Tick(
            batch=batch,
            leaving=tuple((i, member) for (m, i), member in aboard.items() if m == leaving),
            aboard=tuple(aboard.values()),
            stages_active=len({microbatch for microbatch, _ in aboard}),
        )

    def _entering_seats(self) -> list[tuple[int, _Seat]]:
        """Place within the microbatch and seat of those who will be launched at the next tick."""
        return [
            (place, seat)
            for row, seat in self._seats.items()
            for microbatch, place in (self._place(row),)
            if microbatch == self.entering and seat.launchable
        ]

    def _place(self, row: int) -> tuple[int, int]:
        """Microbatch of a row, and its place there."""
        return divmod(row, self.rows // self.stages)
