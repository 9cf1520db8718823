"""A prompt that is repeated before its answer."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from pdjax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Echo:
    """What is repeated of a prompt.

    Attributes:
      text: the prompt as text; "" of token ids of a model without a tokenizer.
      offsets: where in the text each token begins, characters.
    """

    text: str = ""
    offsets: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, prompt: str | list[int], ids: Seq[int]) -> "Echo":
        """The prompt, as it was asked and as token ids. A token that the text does not show has no
        characters there."""
        if tokenizer is None:
            return cls(offsets=[0] * len(ids))
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        hides = tokenizer.decode(ids, skip_special_tokens=False) != text
        decoder, offsets, length = tokenizer.incremental_decoder(hides), list[int](), 0
        for token in ids:
            offsets.append(length)
            length += len(decoder.push(token))
        return cls(text, offsets)


NO_ECHO = Echo()
"""Nothing is repeated."""
