"""A queue of sequences, of which any may come or go at any place, however many there are."""

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from itertools import count, islice
from operator import itemgetter
from typing import Any, NamedTuple, overload

from pdjax.host.sequences.sequence import Sequence

_MOST = 256
"""Entries of a block: it is cut in half beyond."""


class _Entry(NamedTuple):
    """A sequence and its place. No two have the same number, so that nothing after is compared."""

    rank: Any
    number: int
    tokens: int
    sequence: Sequence
    group: Hashable


_last = itemgetter(-1)


class SequenceQueue(Seq[Sequence]):
    """Sequences by their ranks, the least first; of equals the one that was added first.

    Sorted entries are kept in blocks of bounded size (a list of lists, as in `sortedcontainers`),
    so that to add, to remove and to find one takes few comparisons, however many there are. To a
    policy it is a sequence of sequences that can also say what is ahead of one.

    Args:
      group_of: the group of a sequence, which does not change while it is in the queue; None keeps
        no groups.
    """

    def __init__(self, group_of: Callable[[Sequence], Hashable] | None = None) -> None:
        self._entries: dict[Sequence, _Entry] = {}
        self._blocks: list[list[_Entry]] = []
        self._tokens: list[int] = []  # of each block
        self._numbers = count()
        self._group_of = group_of
        self._groups: dict[Hashable, SequenceQueue] = {}

    @classmethod
    def of(
        cls,
        sequences: Iterable[Sequence],
        rank: Callable[[Sequence], Any] | None = None,
        group_of: Callable[[Sequence], Hashable] | None = None,
    ) -> "SequenceQueue":
        """A queue of some sequences, by `rank`, or in their order where there is none."""
        queue = cls(group_of)
        for sequence in sequences:
            queue.add(sequence, 0 if rank is None else rank(sequence))
        return queue

    @property
    def groups(self) -> Mapping[Hashable, "SequenceQueue"]:
        """The queue of each group that has any sequence.

        Raises:
          ValueError: no groups are kept.
        """
        if self._group_of is None:
            raise ValueError("groups: are kept where the prefill policy has a method `group`")
        return self._groups

    def add(self, sequence: Sequence, rank: Any) -> None:
        """Put a sequence at the place that `rank` gives it.

        Raises:
          TypeError: the rank can't be compared with others', or the group be looked up; then
            nothing is added.
        """
        group = None if self._group_of is None else self._group_of(sequence)
        entry = _Entry(rank, next(self._numbers), sequence.length, sequence, group)
        its = None if self._group_of is None else self._groups.get(group)
        if not self._blocks:
            self._blocks.append([entry])
            self._tokens.append(entry.tokens)
        else:
            self._insert(entry)
        self._entries[sequence] = entry
        if self._group_of is not None:
            its = self._groups[group] = its or SequenceQueue()
            its.add(sequence, rank)

    def _insert(self, entry: _Entry) -> None:
        blocks = self._blocks
        at = min(bisect_left(blocks, entry, key=_last), len(blocks) - 1)
        block = blocks[at]
        insort(block, entry)
        self._tokens[at] += entry.tokens
        if len(block) > _MOST:
            halves = block[: _MOST // 2], block[_MOST // 2 :]
            blocks[at : at + 1] = halves
            self._tokens[at : at + 1] = [sum(each.tokens for each in half) for half in halves]

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out.

        Raises:
          KeyError: it is not here.
        """
        at, i = self._place(sequence)
        entry = self._entries.pop(sequence)
        block = self._blocks[at]
        del block[i]
        self._tokens[at] -= entry.tokens
        if not block:
            del self._blocks[at], self._tokens[at]
        if self._group_of is not None:
            its = self._groups[entry.group]
            its.remove(sequence)
            if not its:
                del self._groups[entry.group]

    def discard(self, sequence: Sequence) -> None:
        """Take a sequence out if it is here."""
        if sequence in self._entries:
            self.remove(sequence)

    def tokens_before(self, sequence: Sequence) -> int:
        """Tokens of all sequences ahead of one, as many as each had when it was added.

        Raises:
          KeyError: it is not here.
        """
        at, i = self._place(sequence)
        return sum(self._tokens[:at]) + sum(each.tokens for each in self._blocks[at][:i])

    def _place(self, sequence: Sequence) -> tuple[int, int]:
        """Its block, and its place there."""
        entry = self._entries[sequence]
        at = bisect_left(self._blocks, entry, key=_last)
        return at, bisect_left(self._blocks[at], entry)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._entries

    def __iter__(self) -> Iterator[Sequence]:
        return (entry.sequence for block in self._blocks for entry in block)

    @overload
    def __getitem__(self, index: int) -> Sequence: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sequence]: ...

    def __getitem__(self, index: int | slice) -> Sequence | list[Sequence]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step > 0:  # no further than asked for
                return list(islice(self, start, max(start, stop), step))
            return list(self)[index]
        left = index if index >= 0 else index + len(self)
        if 0 <= left < len(self):
            for block in self._blocks:
                if left < len(block):
                    return block[left].sequence
                left -= len(block)
        raise IndexError(f"index={index}: the queue holds {len(self)} sequences")
