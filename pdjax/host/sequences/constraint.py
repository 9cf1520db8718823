"""The tokens that a sequence may choose next: its guide, the tokens that are allowed, and how many
must come before an end."""

import copy
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from pdjax.core.request import SamplingParams


class SequenceGuide(Protocol):
    """How far a text has come in its form, as `text/guides.py` follows it.

    Attributes:
      accepts: whether the text may end here.
      complete: whether it must: nothing can follow.
    """

    @property
    def accepts(self) -> bool: ...

    @property
    def complete(self) -> bool: ...

    def mask(self) -> np.ndarray:
        """u32[ceil(V / 32)], the tokens that may follow, a fresh array. Tokens that end a text are
        not among them.

        Raises:
          ValueError: the form has become too complex to follow.
        """
        ...

    def push(self, token_id: int) -> None:
        """Add a token that the mask allowed.

        Raises:
          ValueError: likewise.
        """
        ...


class Constraint:
    """The tokens that a sequence may choose next.

    Args:
      params: what the request asks for.
      guide: the form of the text, at its beginning; None has no form.
      vocab_size: V.
      end_token_ids: tokens with which the model ends an answer; a model may name some that it does
        not have.

    Attributes:
      mask: u32[ceil(V / 32)] as in `interfaces.Masks`, never written again; None allows all.
      complete: whether the text has its form, and nothing can follow.
      behind: whether it is being advanced by another thread: nobody else may touch it then.

    Raises:
      ValueError: no token may be chosen.
    """

    def __init__(
        self,
        params: SamplingParams,
        guide: SequenceGuide | None,
        vocab_size: int,
        end_token_ids: Iterable[int],
    ) -> None:
        ends = _bits((token for token in end_token_ids if token < vocab_size), vocab_size)
        self._guide, self._ends = guide, ends
        self._closing = np.zeros_like(ends) if params.ignore_eos else ends
        self._allowed = ~np.zeros_like(ends)
        if params.allowed_token_ids is not None:
            self._allowed = _bits(params.allowed_token_ids, vocab_size)
        self._is_free = guide is None and params.allowed_token_ids is None
        self._stops = ends | _bits(params.stop_token_ids, vocab_size)
        self._early = params.min_tokens  # tokens before which nothing ends
        self.mask: np.ndarray | None = None
        self.complete = self.behind = False
        self._renew()

    @property
    def guided(self) -> bool:
        """Whether it has a guide, which may take a while."""
        return self._guide is not None

    def again(self, guide: SequenceGuide | None) -> "Constraint":
        """The same for another choice, likewise at its beginning.

        Args:
          guide: of the same form, of that choice; it is not touched yet.
        """
        other = copy.copy(self)
        other._guide = guide
        return other

    def advance(self, token_id: int, *, last: bool = False) -> None:
        """Add a token that was chosen, and work out the mask of the next one.

        Args:
          last: whether there is no next one, whatever the form says.

        Raises:
          ValueError: no token may be chosen, or the form has become too complex to follow.
        """
        self._early = max(0, self._early - 1)
        if self._guide is not None:
            self._guide.push(token_id)
            self.complete = self._guide.complete
        if not (self.complete or last):
            self._renew()

    def _renew(self) -> None:
        if self._is_free and not self._early:
            self.mask = None
            return
        mask = self._allowed
        if self._guide is not None:
            closing = self._closing if self._guide.accepts else np.uint32(0)
            mask = mask & ((self._guide.mask() & ~self._ends) | closing)
        if self._early:
            mask = mask & ~self._stops
        if not mask.any():
            raise ValueError("guide, allowed_token_ids, min_tokens: together they allow no token")
        self.mask = mask


def _bits(token_ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """u32[ceil(V / 32)] with the bits of these tokens."""
    allowed = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    allowed[list(token_ids)] = True
    return np.packbits(allowed, bitorder="little").view(np.uint32)
