"""Reads prompts, conversations and params in the forms that a caller may give them.

An iterator can be read only once, so it becomes a list before its values are examined. An endless
iterator is read up to a bound.
"""

import itertools
from collections.abc import Iterable, Mapping, Set, Sized
from numbers import Integral
from typing import Any

from pdjax.core.messages import shown
from pdjax.text.tokenizer import Message

Prompt = str | Iterable[int]
"""Text or token ids."""

MOST = 1 << 22
"""Most values read from an iterable without a length: token ids, prompts or messages."""


def each_prompt(prompts: Any) -> list[Any]:
    """List the prompts of `prompts`, one or several; the prompts themselves are not checked.

    Raises:
      ValueError: `prompts` is neither.
    """
    if isinstance(prompts, str):
        return [prompts]
    several = _list(prompts, "prompts", "must be text or token ids, or a list of those")
    return [several] if any(isinstance(each, Integral) for each in several) else several


def token_ids_of(prompt: Any) -> list[int]:
    """Return the ids of a prompt that is not text; ids may be integers of numpy.

    Raises:
      ValueError: the prompt is not a list of token ids.
    """
    ids = _list(prompt, "prompt", "must be text or a list of token ids")
    if set(map(type, ids)) <= {int}:
        return ids  # a check of each id takes a microsecond, and all decoding sequences wait for it
    for token in ids:
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise ValueError(
                f"prompt: {shown(token)} is not a token id; must be text or a list of token ids"
            )
    return [int(token) for token in ids]


def each_conversation(messages: Any) -> list[list[Message]]:
    """List the conversations of `messages`, one or several.

    Raises:
      ValueError: `messages` is neither.
    """
    allowed = "must be a list of messages, or a list of those"
    several = _list(messages, "messages", allowed)
    if not several:
        raise ValueError("messages=[]: must have at least one message")
    if any(isinstance(each, Mapping) for each in several):
        return [several]
    return [_list(conversation, "messages", allowed) for conversation in several]


def params_of_each(params: Any) -> list[Any]:
    """List the params of several prompts; the params themselves are not checked.

    Raises:
      ValueError: they are not a list.
    """
    return _list(params, "params", "must be a SamplingParams, a list of those, or None")


def _list(values: Any, name: str, allowed: str) -> list[Any]:
    """Put `values`, an ordered iterable, into a list.

    Bytes and mappings are refused: bytes would pass as token ids, and a mapping as its keys.
    """
    if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Set):
        try:
            each = iter(values)
        except TypeError:  # such as an array without dimensions
            pass
        else:
            found = list(values if isinstance(values, Sized) else itertools.islice(each, MOST + 1))
            if len(found) > MOST:
                raise ValueError(f"{name}: more than {MOST} values; must be at most {MOST}")
            return found
    raise ValueError(f"{name}={shown(values)}: {allowed}")
