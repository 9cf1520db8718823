"""Which request of a workload is due when: the one thing that all who play a workload go by."""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from pdjax.core.request import Request
from pdjax.workloads.arrival import Arrival, tokens_of


@dataclass(frozen=True)
class Call:
    """A request that is due.

    Attributes:
      number: of the arrival in the workload.
      arrival: what is asked.
      moment: when it is due, seconds on the clock of those who play it.
      prompt: its token ids, with the conversation before.
    """

    number: int
    arrival: Arrival
    moment: float
    prompt: tuple[int, ...]

    @property
    def id(self) -> str:
        """Names it within the workload."""
        return self.arrival.name(self.number)

    def request(self) -> Request:
        """What engines are asked."""
        return self.arrival.request_of(self.prompt, self.number, self.moment)


class Schedule:
    """What of a workload is due, and what waits for an answer.

    Args:
      arrivals: the workload; one that comes after another stands behind it.
      vocab_size: token ids are below it.
      salt: another salt gives other tokens, of which no prefix cache knows.
      first: number of the first arrival.
      start: of the workload, seconds on the clock of those who play it; all moments are on it.

    Raises:
      ValueError: two of one id, or one that comes after none before it.
    """

    def __init__(
        self,
        arrivals: Iterable[Arrival],
        vocab_size: int,
        salt: str = "",
        first: int = 0,
        start: float = 0.0,
    ) -> None:
        self._vocab_size, self._salt = vocab_size, salt
        self._after: defaultdict[str, list[tuple[int, Arrival]]] = defaultdict(list)
        self._due: list[tuple[float, int, Arrival, tuple[int, ...]]] = []  # a heap
        known = set[str]()
        for number, arrival in enumerate(arrivals, first):
            name = arrival.name(number)
            if name in known:
                raise ValueError(f"id={name!r}: must be of one request only")
            if not arrival.after:
                heapq.heappush(self._due, (start + arrival.moment, number, arrival, ()))
            elif arrival.after in known:
                self._after[arrival.after].append((number, arrival))
            else:
                raise ValueError(f"after={arrival.after!r}: must be a request before {name!r}")
            known.add(name)
        self.count = len(known)

    @property
    def next_moment(self) -> float | None:
        """When the next request is due; None where none is before another has ended."""
        return self._due[0][0] if self._due else None

    def take(self, now: float = math.inf) -> list[Call]:
        """Take the requests that are due by now, in order."""
        taken = []
        while self._due and self._due[0][0] <= now:
            moment, number, arrival, before = heapq.heappop(self._due)
            own = arrival.own_tokens(number, self._vocab_size, self._salt).tolist()
            taken.append(Call(number, arrival, moment, (*before, *own)))
        return taken

    def has_followers(self, call: Call) -> bool:
        """Whether some request waits for the end of this one."""
        return call.id in self._after

    def ended(self, call: Call, moment: float, answer: Seq[int] | None, count: int = 0) -> None:
        """A request has ended well, so that those after it are dated.

        Args:
          moment: of its end.
          answer: its token ids; None where they are not known, so that others stand for them.
          count: how many there were, where they are not known.
        """
        for number, arrival in self._after.pop(call.id, ()):
            before: tuple[int, ...] = ()
            if arrival.continues:
                if answer is None:
                    key = f"{self._salt}answer to {call.id}"
                    answer = tokens_of(key, count, self._vocab_size).tolist()
                before = (*call.prompt, *answer)
            heapq.heappush(self._due, (moment + arrival.moment, number, arrival, before))

    def broken(self, call: Call) -> list[tuple[int, Arrival]]:
        """A request has not ended well: those that wait for it, and those after them, never come.
        They are returned with their numbers."""
        lost, names = list[tuple[int, Arrival]](), [call.id]
        while names:
            gone = self._after.pop(names.pop(), [])
            lost += gone
            names += [arrival.name(number) for number, arrival in gone]
        return lost
