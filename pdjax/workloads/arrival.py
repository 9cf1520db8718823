"""What is asked of a system: requests by their lengths, when they arrive, and what they share.

A workload is an iterable of `Arrival`s. Nothing of it depends on the system that it is given to:
the tokens of a prompt are made from keys when it is known how many tokens a vocabulary has, and an
arrival that waits for an answer is dated by a `Schedule` (schedule.py), which simulated engines,
engines of this process and clients of a server all go by.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from pdjax.core.request import Request, SamplingParams
from pdjax.core.slo import SLO


class Piece(NamedTuple):
    """A stretch of a prompt.

    Attributes:
      key: decides its tokens: pieces of one key are the same tokens, and a shorter one is the
        beginning of a longer one.
      length: tokens.
    """

    key: str
    length: int


@dataclass(frozen=True)
class Arrival:
    """One request to come.

    Attributes:
      moment: when it arrives, seconds after the start of the workload; where it comes after
        another request, seconds after the end of that one.
      prompt: tokens that it asks with. A turn of a conversation has those of the turns before
        besides.
      output: tokens that are generated.
      id: names it within the workload; "" is r and its number.
      pieces: what its prompt consists of; none is one piece that no other request shares.
      after: id of the request that must have ended before it comes; "" waits for none.
      continues: whether its prompt begins with the prompt and the answer of `after`.
      session: names its conversation, or its client in a closed loop; "" has none.
      turn: its number in the session, from 0.
      priority, deadline, labels: as in `Request`. A request has its session as a label besides.
      slo: latencies that are wanted, `ttft` and `tpot`, as in `Request`; None wishes none.

    Raises:
      ValueError: a moment before the start, a length below one, pieces that are not as long as the
        prompt, one that continues nothing, an SLO with another bound, or what `Request` refuses.
    """

    moment: float
    prompt: int
    output: int
    id: str = ""
    pieces: tuple[Piece, ...] = ()
    after: str = ""
    continues: bool = False
    session: str = ""
    turn: int = 0
    priority: int = 0
    deadline: float | None = None
    slo: SLO | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not 0 <= self.moment < float("inf"):
            raise ValueError(f"moment={self.moment}: must be 0 or more")
        for name in ("prompt", "output"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1 token")
        if self.pieces:
            lengths = [piece.length for piece in self.pieces]
            if min(lengths) < 1 or sum(lengths) != self.prompt:
                raise ValueError(
                    f"pieces: {len(lengths)} of {sum(lengths)} tokens; each must be at least 1 "
                    f"token, and all of them prompt={self.prompt}"
                )
        if self.continues and not self.after:
            raise ValueError("continues=True: must come after another request")
        if self.priority != 0 or self.labels or (self.deadline, self.slo) != (None, None):
            self.request_of((), 0)  # which checks them
            if self.slo is not None and (self.slo.itl, self.slo.e2el) != (None, None):
                raise ValueError("slo: must have no bound but ttft and tpot")

    def name(self, number: int) -> str:
        """Its id as the `number`-th request of a workload."""
        return self.id or f"r{number}"

    def own_tokens(self, number: int, vocab_size: int, salt: str = "") -> np.ndarray:
        """The tokens i32[prompt] that it asks with, as the `number`-th of a workload.

        Args:
          salt: another salt gives other tokens, of which no prefix cache knows.
        """
        pieces = self.pieces or (Piece(f"of {number}", self.prompt),)
        made = [tokens_of(salt + piece.key, piece.length, vocab_size) for piece in pieces]
        return np.concatenate(made)

    def request(self, number: int, vocab_size: int) -> Request:
        """The `number`-th request of a workload, which continues no other; greedy, of exactly
        `output` tokens."""
        return self.request_of(tuple(self.own_tokens(number, vocab_size).tolist()), number)

    def request_of(self, prompt: tuple[int, ...], number: int, moment: float = -1.0) -> Request:
        """Its request with a whole prompt; it arrives at `moment`, or else at its own."""
        params = SamplingParams(
            temperature=0.0, seed=number, max_tokens=self.output, ignore_eos=True
        )
        session = {"session": self.session} if self.session else {}
        return Request(
            self.name(number),
            prompt,
            params,
            self.moment if moment < 0 else moment,
            priority=self.priority,
            deadline=self.deadline,
            labels={**session, **self.labels},
            slo=self.slo,
        )


def tokens_of(key: str, length: int, vocab_size: int) -> np.ndarray:
    """The tokens i32[length] of a key, in [1, vocab_size).

    The i-th is a hash of the key and i (SplitMix64; Steele et al. 2014), the same on every machine.

    Raises:
      ValueError: a vocabulary of fewer than two tokens.
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size}: must be at least 2")
    start = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")
    steps = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = steps + np.uint64(start)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed % np.uint64(vocab_size - 1)).astype(np.int32) + np.int32(1)
