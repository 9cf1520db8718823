"""What a caller may give as prompts, as conversations or as their params, and what is taken of it.

An iterator can be read once: what has been taken out of it to see what it is must not be missing
afterwards. An endless one is read to a bound.
"""

import itertools
from collections.abc import Iterable, Mapping, Set, Sized
from numbers import Integral
from typing import Any

from pdjax.text.tokenizer import Message

Prompt = str | Iterable[int]
"""Text or token ids."""

MOST = 1 << 22
"""Values that are read of what does not say how many it has: token ids, prompts or messages."""


def each_prompt(prompts: Any) -> list[Any]:
    """Every prompt of what may be one or several, itself not looked into.

    Raises:
      ValueError: it is neither.
    """
    if isinstance(prompts, str):
        return [prompts]
    several = _list(prompts, "prompts", "must be text or token ids, or a list of those")
    return [several] if any(isinstance(each, Integral) for each in several) else several


def token_ids_of(prompt: Any) -> list[int]:
    """The ids of a prompt that is not text; any integers, those of numpy too.

    Raises:
      ValueError: it is no list of token ids.
    """
    ids = _list(prompt, "prompt", "must be text or a list of token ids")
    if set(map(type, ids)) <= {int}:
        return ids  # to look at each takes a microsecond, for which every sequence in decode waits
    for token in ids:
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise ValueError(
                f"prompt: {_short(token)} is not a token id; must be text or a list of token ids"
            )
    return [int(token) for token in ids]


def each_conversation(messages: Any) -> list[list[Message]]:
    """Every conversation of what may be one or several.

    Raises:
      ValueError: it is neither.
    """
    allowed = "must be a list of messages, or a list of those"
    several = _list(messages, "messages", allowed)
    if not several:
        raise ValueError("messages=[]: must have at least one message")
    if any(isinstance(each, Mapping) for each in several):
        return [several]
    return [_list(conversation, "messages", allowed) for conversation in several]


def params_of_each(params: Any) -> list[Any]:
    """The params of several prompts, themselves not looked into.

    Raises:
      ValueError: they are no list.
    """
    return _list(params, "params", "must be a SamplingParams, a list of those, or None")


def _list(values: Any, name: str, allowed: str) -> list[Any]:
    """`values`, which have an order, in a list.

    Bytes would be taken for token ids, and a mapping for its keys.
    """
    if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Set):
        try:
            each = iter(values)
        except TypeError:  # such as of an array without dimensions
            pass
        else:
            found = list(values if isinstance(values, Sized) else itertools.islice(each, MOST + 1))
            if len(found) > MOST:
                raise ValueError(f"{name}: more than {MOST} values; must be at most {MOST}")
            return found
    raise ValueError(f"{name}={_short(values)}: {allowed}")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
