"""Stop strings: finds where the first of many strings begins in a text that arrives in pieces.

The strings become one automaton (Aho and Corasick, "Efficient string matching: an aid to
bibliographic search", 1975). It reads each character once, so that the cost of a piece grows with
its length alone, not with the number or length of the strings.
"""

from collections.abc import Iterable
from typing import NamedTuple

_SHIFT = 21
"""Bits of a code point. An edge of the automaton is one integer: the state above these bits."""


class Match(NamedTuple):
    """A stop string, and where it begins.

    `start` counts characters from the start of the piece in which the string ended; it is negative
    if the string begins in an earlier piece.
    """

    stop: str
    start: int


class StopStrings:
    """Searches for strings. `search` changes nothing here, so many texts can share one object.

    A state stands for the longest prefix of any string with which the text so far ends. State 0 is
    the empty prefix.

    Args:
      stops: the strings, none of them empty.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._edges: dict[int, int] = {}
        self._depth = [0]  # length of each state's prefix
        self._found: list[str | None] = [None]  # the longest string that each state ends with
        self._fallback = [0]  # each state's longest proper suffix that is also a state
        self._set_fallbacks(self._add_states(stops))

    def search(self, state: int, piece: str) -> tuple[int, Match | None]:
        """Read `piece` from `state`; return the new state and the match that begins first, or None.

        A match ends in the piece. Of two strings that begin at the same place the shorter wins.
        """
        edges, fallback, found, depth = self._edges, self._fallback, self._found, self._depth
        match = None
        for end, character in enumerate(piece, 1):
            code = ord(character)
            while (longer := edges.get(state << _SHIFT | code)) is None and state:
                state = fallback[state]
            state = longer or 0
            stop = found[state]
            if stop is not None and (match is None or end - len(stop) < match.start):
                match = Match(stop, end - len(stop))
            if match is not None and end - depth[state] >= match.start:
                break  # no later string begins earlier
        return state, match

    def held_back(self, state: int) -> int:
        """Number of characters at the end of the text that may begin a string."""
        return self._depth[state]

    def _add_states(self, stops: Iterable[str]) -> list[list[tuple[int, int]]]:
        """Build the tree of prefixes. Return for each length the states as (edge to it, state)."""
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
                    self._fallback.append(0)
                    if depth == len(levels):
                        levels.append([])
                    levels[depth].append((edge, child))
                state = child
            self._found[state] = stop
        return levels

    def _set_fallbacks(self, levels: list[list[tuple[int, int]]]) -> None:
        """Find each state's longest proper suffix that is a state, in order of length."""
        edges, fallback, found = self._edges, self._fallback, self._found
        for level in levels[1:]:
            for edge, state in level:
                suffix, code = fallback[edge >> _SHIFT], edge & ((1 << _SHIFT) - 1)
                while (longer := edges.get(suffix << _SHIFT | code)) is None and suffix:
                    suffix = fallback[suffix]
                fallback[state] = longer or 0
                if found[state] is None:
                    found[state] = found[fallback[state]]
