"""Finds the end tokens of a model in all files of a Hugging Face directory that name them.

An end token ends a text or a turn. transformers takes `generation_config.json`, else `config.json`;
vLLM adds the tokenizer's `eos_token`; llama.cpp adds tokens with the text of a known end of turn.
Where the files disagree, any of these tokens ends a sequence: a missed end token would make the
sequence run to `max_tokens`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pdjax.core.messages import shown
from pdjax.formats.json_file import read_json

GENERATION_FILE = "generation_config.json"
MODEL_FILE = "config.json"

END_OF_TURN_TEXTS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_utterance>",
)
"""Texts of tokens that end a turn or a text in the chat formats of Llama-like models."""


def stated_end_token_ids(directory: Path) -> tuple[int, ...]:
    """Read `eos_token_id` from `generation_config.json` and `config.json` of `directory`.

    Raises:
      ValueError: an `eos_token_id` is neither a token id nor a list of them; the message names the
        file.
    """
    ids: list[int] = []
    for name in (GENERATION_FILE, MODEL_FILE):
        if (directory / name).is_file():
            ids += _listed(directory / name, read_json(directory / name).get("eos_token_id"))
    return tuple(dict.fromkeys(ids))


def end_token_ids(
    directory: Path, eos_token: str | None, id_of: Callable[[str], int | None]
) -> tuple[int, ...]:
    """Return every end token of the model in `directory`.

    Args:
      directory: holds a Hugging Face model, or a model that `pdjax convert` wrote.
      eos_token: text of the tokenizer's end token, or None.
      id_of: returns the token id of a text that is one token of the vocabulary, else None.

    Raises:
      ValueError: see `stated_end_token_ids`.
    """
    texts = ((eos_token,) if eos_token is not None else ()) + END_OF_TURN_TEXTS
    known = [found for text in texts if (found := id_of(text)) is not None]
    return tuple(dict.fromkeys([*stated_end_token_ids(directory), *known]))


def _listed(path: Path, ids: Any) -> list[int]:
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int and 0 <= i < 2**31 for i in listed):
        raise ValueError(
            f"{path}: eos_token_id={shown(ids)}: must be a token id, 0 or more, or a list of them"
        )
    return listed
