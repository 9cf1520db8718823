"""Forms whose states can be worked out by hand, and what may bound the choice of tokens."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from pdjax.core.guide import Guide
from pdjax.core.request import Request, SamplingParams
from pdjax.host.sequences.constraint import Constraint
from pdjax.host.sequences.guide_threads import Advanced, GuideThreads, advanced
from pdjax.host.sequences.sequence import Sequence

VOCAB = 97
END_TOKEN = 0

CONSTRAINTS: tuple[dict[str, Any], ...] = (
    *({"guide": Guide.regex("a fake one's form")},) * 2,
    {"logit_bias": {3: 1.5, 20: -100}},
    {"allowed_token_ids": [END_TOKEN, *range(5, VOCAB, 3)]},
    {"min_tokens": 1},
    {"min_tokens": 4, "guide": Guide.regex("a fake one's form"), "logit_bias": {7: 2}},
)
"""What may bound the choice of tokens."""


class FakeGuide:
    """A form in which all tokens so far decide which may follow, whether the text may end, and
    whether it must."""

    def __init__(self) -> None:
        self._said = 0

    @property
    def accepts(self) -> bool:
        return self._said % 2 == 0

    @property
    def complete(self) -> bool:
        return self._said % 13 == 12

    def mask(self) -> np.ndarray:
        """Two of three tokens."""
        return bits([token for token in range(VOCAB) if (token + self._said) % 3])

    def push(self, token_id: int) -> None:
        assert (token_id + self._said) % 3, "not allowed"
        self._said = (self._said * 7 + token_id) % 91


class SlowGuides(GuideThreads):
    """Follows guides without threads: each token takes none, one or several turns, drawn from
    `chance`.

    Attributes:
      late: tokens that have taken at least one.
    """

    def __init__(self, chance: random.Random) -> None:
        super().__init__(1, lambda: None)
        self._chance, self.late = chance, 0

    def advance(self, sequence: Sequence) -> None:
        self._todo.append(sequence)

    def take(self) -> Iterator[Advanced]:
        for _ in range(len(self._todo)):
            sequence = self._todo.popleft()
            if self._chance.random() < 0.5:
                self._done.append(Advanced(sequence, advanced(sequence)))
            else:
                self.late += 1
                self._todo.append(sequence)
        return super().take()


def make_guide(request: Request) -> FakeGuide | None:
    """The guide of a choice, at its beginning."""
    return None if request.params.guide is None else FakeGuide()


def bits(tokens: list[int]) -> np.ndarray:
    """The mask that allows these tokens."""
    allowed = np.zeros(-(-(VOCAB + 1) // 32) * 32, bool)
    allowed[tokens] = True
    return np.packbits(allowed, bitorder="little").view(np.uint32)


def constraint_of(request: Request) -> Constraint | None:
    """What a choice may choose from, at its beginning."""
    if not request.params.constrained:
        return None
    return Constraint(request.params, make_guide(request), VOCAB + 1, [END_TOKEN])


def constrained(params: SamplingParams, draw: random.Random) -> SamplingParams:
    """The same, perhaps with a constraint; asks for as many tokens as that wants."""
    if draw.random() < 0.5:
        return params
    constraint = draw.choice(CONSTRAINTS)
    least = constraint.get("min_tokens", 0)
    most = None if params.max_tokens is None else max(params.max_tokens, least)
    return replace(params, max_tokens=most, **constraint)


def completes(request: Request, output: list[int]) -> bool:
    """Whether the form of a request is complete with an output that no token has ended."""
    constraint = constraint_of(request)
    if constraint is None:
        return False
    for token in output:
        constraint.advance(token, last=True)
    return constraint.complete
