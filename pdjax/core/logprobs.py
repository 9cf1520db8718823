"""Log-probabilities of tokens: of one that was chosen, and of all tokens of a prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of a chosen token, and of the likeliest ones, best first."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability)


@dataclass(frozen=True, slots=True)
class PromptTokenLogprobs(TokenLogprobs):
    """Log-probability of a token of a prompt, and of the ones that were likeliest in its place.

    Attributes:
      token: its id.
      rank: its place among all tokens, the likeliest first, from 1.
    """

    token: int
    rank: int


class PromptLogprobs(Sequence[PromptTokenLogprobs | None]):
    """Log-probabilities of the P tokens of a prompt, each given the tokens before it; None for the
    first one, which has none before it.

    They are kept as arrays, and an entry is made when it is read: a long prompt has some hundred
    thousand numbers.

    Args:
      token_ids: i32[P] of the prompt.
      chosen: f32[P - 1] log-probabilities of the tokens after the first.
      ranks: i32[P - 1] their places, from 1.
      top_ids, top: i32[P - 1, n] and f32[P - 1, n] the n likeliest, best first.
    """

    def __init__(
        self,
        token_ids: np.ndarray,
        chosen: np.ndarray,
        ranks: np.ndarray,
        top_ids: np.ndarray,
        top: np.ndarray,
    ) -> None:
        self._token_ids, self._chosen, self._ranks = token_ids, chosen, ranks
        self._top_ids, self._top = top_ids, top

    def __len__(self) -> int:
        return len(self._token_ids)

    def __iter__(self) -> Iterator[PromptTokenLogprobs | None]:
        return map(self._entry, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> PromptTokenLogprobs | None: ...

    @overload
    def __getitem__(self, index: slice) -> list[PromptTokenLogprobs | None]: ...

    def __getitem__(self, index: Any) -> Any:
        places = range(len(self))[index]
        return self._entry(places) if isinstance(places, int) else [*map(self._entry, places)]

    def _entry(self, place: int) -> PromptTokenLogprobs | None:
        if place == 0:
            return None
        at = place - 1
        top = zip(self._top_ids[at].tolist(), self._top[at].tolist(), strict=True)
        return PromptTokenLogprobs(
            float(self._chosen[at]),
            tuple(top),
            token=int(self._token_ids[place]),
            rank=int(self._ranks[at]),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PromptLogprobs):
            return NotImplemented
        return all(np.array_equal(x, vars(other)[name]) for name, x in vars(self).items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"PromptLogprobs({len(self)} tokens)"
