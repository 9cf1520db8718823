"""Stop strings: where the first of many strings begins in a text that arrives in pieces.

The strings become one automaton (Aho and Corasick, "Efficient string matching: an aid to
bibliographic search", 1975). It reads each character once, so that a piece costs as much as it is
long, however many the strings are and however long.
"""

from collections.abc import Iterable
from typing import NamedTuple

_SHIFT = 21
"""Bits of a code point. A state above them makes an edge of the automaton one integer."""


class Match(NamedTuple):
    """A stop string, and where it begins: characters from the start of the piece that ended it, so
    that the place may be negative."""

    stop: str
    start: int


class StopStrings:
    """Strings to be searched for. Searching changes nothing here, so that many texts can share it.

    A state stands for a prefix of some string: the longest with which the text so far ends. State 0
    is the empty prefix.

    Args:
      stops: the strings, none of them empty.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._edges: dict[int, int] = {}
        self._depth = [0]  # length of each state's prefix
        self._found: list[str | None] = [None]  # the longest string with which a state ends
        self._shorter = [0]  # the longest proper suffix of a state that is a state, too
        self._link(self._grow(stops))

    def search(self, state: int, piece: str) -> tuple[int, Match | None]:
        """Read `piece` in `state`; the new state, and the earliest string that ended in the piece.

        Of two strings that begin at the same place the shorter counts.
        """
        edges, shorter, found, depth = self._edges, self._shorter, self._found, self._depth
        match = None
        for end, character in enumerate(piece, 1):
            code = ord(character)
            while (longer := edges.get(state << _SHIFT | code)) is None and state:
                state = shorter[state]
            state = longer or 0
            stop = found[state]
            if stop is not None and (match is None or end - len(stop) < match.start):
                match = Match(stop, end - len(stop))
            if match is not None and end - depth[state] >= match.start:
                break  # no later string begins earlier
        return state, match

    def held_back(self, state: int) -> int:
        """Characters at the end of the text with which a string may begin."""
        return self._depth[state]

    def _grow(self, stops: Iterable[str]) -> list[list[tuple[int, int]]]:
        """Make the tree of prefixes; for each length, its states as (edge to it, state)."""
        levels: list[list[tuple[int, int]]] = []
        for stop in stops:
            state = 0
            for depth, character in enumerate(stop):
                edge = state << _SHIFT | ord(character)
                child = self._edges.get(edge)
                if child is None:
                    child = self._edges[edge] = len(self._depth)
                    self._depth.append(depth + 1)
                    self._found.append(None)
                    self._shorter.append(0)
                    if depth == len(levels):
                        levels.append([])
                    levels[depth].append((edge, child))
                state = child
            self._found[state] = stop
        return levels

    def _link(self, levels: list[list[tuple[int, int]]]) -> None:
        """Find each state's longest suffix that is a state; shorter states come first."""
        edges, shorter, found = self._edges, self._shorter, self._found
        for level in levels[1:]:
            for edge, state in level:
                suffix, code = shorter[edge >> _SHIFT], edge & ((1 << _SHIFT) - 1)
                while (longer := edges.get(suffix << _SHIFT | code)) is None and suffix:
                    suffix = shorter[suffix]
                shorter[state] = longer or 0
                if found[state] is None:
                    found[state] = found[shorter[state]]
