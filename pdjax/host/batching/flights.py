"""Microbatches between the tick at which they are launched and that at which they leave."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from pdjax.core.kv_layout import NULL_PAGE
from pdjax.host.sequences.reference import SequenceRef, ids_of
from pdjax.interfaces.batches import IDLE_ROW


class Occupants(NamedTuple):
    """The sequences in flight in a microbatch, each with its entry, and the places of its rows,
    i32[count], ascending, which were launched."""

    places: np.ndarray
    entries: tuple[tuple[int, SequenceRef], ...]
    refs: tuple[SequenceRef, ...]
    ids: str

    @classmethod
    def of(cls, places: np.ndarray, entries: Seq[tuple[int, SequenceRef]]) -> "Occupants":
        """Sequences by their entries."""
        refs = tuple(ref for _, ref in entries)
        return cls(places, tuple(entries), refs, ids_of(refs))

    def without(self, entry: int) -> "Occupants":
        """The others keep their entries."""
        return Occupants.of(self.places, [each for each in self.entries if each[0] != entry])


class Flight(NamedTuple):
    """A microbatch that has been launched: entry e is the row at the e-th of its places. The arrays
    are padded to n entries, a bucket, and are never written again."""

    occupants: Occupants
    rows: np.ndarray  # i32[n]
    positions: np.ndarray  # i32[n]
    table: np.ndarray  # i32[n, W], null where no row is in flight; W is a bucket

    @property
    def entries(self) -> int:
        """n."""
        return len(self.rows)

    @property
    def pages(self) -> int:
        """W."""
        return self.table.shape[1]

    def entry_of(self, place: int) -> int | None:
        """The entry of the row at a place of the microbatch; None where it was not launched."""
        places = self.occupants.places
        entry = int(places.searchsorted(place))
        return entry if entry < len(places) and places[entry] == place else None

    def without(self, entry: int) -> "Flight | None":
        """The same with one entry idle; None if no sequence is left."""
        occupants = self.occupants.without(entry)
        if not occupants.entries:
            return None
        positions, table = self.positions.copy(), self.table.copy()
        positions[entry], table[entry] = IDLE_ROW, NULL_PAGE
        return self._replace(occupants=occupants, positions=positions, table=table)


@dataclass
class Course:
    """Launches of a microbatch that differ in the positions alone: until a row joins or leaves,
    needs a page, or has been launched for its last token."""

    flight: Flight  # the launch before
    launched: np.ndarray  # i32[n], 1 for each row that is launched
    left: int  # launches
    launches: int = 0  # so far

    def next(self) -> Flight:
        """The next launch."""
        self.left -= 1
        self.launches += 1
        occupants, rows, positions, table = self.flight
        # Padding stays where it is.
        self.flight = Flight(occupants, rows, positions + self.launched, table)
        return self.flight


class Aboard(NamedTuple):
    """What is under the stages at a tick: arrays of a `DecodeBatch`, and its sequences.

    Attributes:
      refs: the sequences under all stages; `ids` for a reader.
      stages_active: stages with a sequence under them.
    """

    rows: np.ndarray  # i32[R, n]
    positions: np.ndarray  # i32[R, n]
    page_table: np.ndarray  # i32[R, n, W]
    refs: tuple[SequenceRef, ...]
    ids: str
    stages_active: int

    @classmethod
    def alone(cls, flight: Flight) -> "Aboard":
        """A flight under the only stage."""
        occupants, rows, positions, table = flight
        return cls(rows[None], positions[None], table[None], occupants.refs, occupants.ids, 1)

    @classmethod
    def of(cls, flights: Seq[Flight | None], n: int, pages: int) -> "Aboard":
        """The flights under each stage, padded to n entries and so many pages."""
        occupants = [flight.occupants for flight in flights if flight is not None]
        refs = tuple(chain.from_iterable(each.refs for each in occupants))
        ids = occupants[0].ids if len(occupants) == 1 else ids_of(refs)
        return cls(*_stacked(flights, n, pages), refs, ids, len(occupants))


def largest(flights: Seq[Flight | None]) -> tuple[int, int]:
    """The most entries and the most pages of any flight; 1 and 1 where there is none."""
    n = pages = 1
    for flight in flights:
        if flight is not None:
            n, pages = max(n, flight.entries), max(pages, flight.pages)
    return n, pages


def _stacked(
    flights: Seq[Flight | None], n: int, pages: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = len(flights), n
    rows = np.zeros(shape, np.int32)
    positions = np.full(shape, IDLE_ROW, np.int32)
    table = np.full((*shape, pages), NULL_PAGE, np.int32)
    for stage, flight in enumerate(flights):
        if flight is not None:
            rows[stage, : flight.entries] = flight.rows
            positions[stage, : flight.entries] = flight.positions
            table[stage, : flight.entries, : flight.pages] = flight.table
    return rows, positions, table
