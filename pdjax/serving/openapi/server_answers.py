"""The answers that tell of the model and its tokens, for the document; see answers.py."""

from typing import Literal

from pdjax.serving.openapi.answers import Answer


class ModelCard(Answer):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    """Seconds since 1970, of the server's start."""
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    """Most tokens of prompt and answer together."""


class ModelList(Answer):
    """All models that are served: one."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(Answer):
    """The tokens of a text or a conversation."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None
    """With `return_token_strs`."""


class Detokenized(Answer):
    """The text of token ids."""

    prompt: str


class TokenizerInfo(Answer):
    """Special tokens and the chat template; further special tokens have fields of their own."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | dict[str, str] | None
    vocab_size: int
    model_max_length: int
