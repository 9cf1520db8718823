"""The tokenizer: text to token ids and back, chat templates, and decoding of streams.

It comes from a Hugging Face directory (`tokenizer_files.py`) or from a GGUF file
(`tokenizer_gguf.py`). It runs on the host and uses no JAX.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from pdjax.core.clock import strftime_now
from pdjax.core.messages import shown
from pdjax.formats.gguf_metadata import Metadata
from pdjax.formats.gguf_splits import open_first
from pdjax.formats.json_file import failures_named
from pdjax.text import tokenizer_gguf
from pdjax.text.chat_template import ChatTemplates, Message
from pdjax.text.detokenizer import Detokenizer, IncrementalDecoder
from pdjax.text.end_tokens import GENERATION_FILE, end_token_ids
from pdjax.text.gguf_end_tokens import eos_token_ids
from pdjax.text.special_tokens import CONFIG_FILE
from pdjax.text.tokenizer_files import (
    COMPLETE,
    IMPLIED,
    TOKENIZER_FILE,
    NoTokenizer,
    read_tokenizer,
)

__all__ = ["TOKENIZER_FILE", "IncrementalDecoder", "Message", "NoTokenizer", "Tokenizer"]


_LONG = 1 << 16
"""Characters of a text that takes some hundredths of a second to cut."""


class Tokenizer:
    """A vocabulary, its rules, and chat templates.

    Args:
      backend: vocabulary and rules.
      eos_token_ids: tokens that end a text or a turn, by the model's files.
      chat_template: Jinja source, or sources by name, or None.
      bos_token, eos_token: texts that a chat template may use, or None.
      special_tokens: texts of control tokens by the names that chat templates use; may hold
        `bos_token` and `eos_token`, too.
      implied_tokens: texts of tokens that the model has never seen: only the tokenizer's class
        names them.
      strftime_now: formats the date for chat templates that print one.

    Raises:
      ValueError: the backend can't decode.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Iterable[int] = (),
        chat_template: str | Mapping[str, str] | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        implied_tokens: Iterable[str] = (),
        strftime_now: Callable[[str], str] = strftime_now,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._detokenizer = Detokenizer(backend)
        self.eos_token_ids = tuple(eos_token_ids)
        named = {"bos_token": bos_token, "eos_token": eos_token, **(special_tokens or {})}
        self.special_tokens = {name: text for name, text in named.items() if text is not None}
        self._implied = sorted(implied_tokens)
        self._templates = ChatTemplates(chat_template, self.special_tokens, strftime_now)

    @classmethod
    def open(
        cls, path: str | Path, *, strftime_now: Callable[[str], str] = strftime_now
    ) -> "Tokenizer":
        """Open the tokenizer of a GGUF file or of a Hugging Face directory.

        `strftime_now` formats the date for chat templates that print one.

        Raises:
          NoTokenizer: a ValueError; the directory holds no tokenizer of a supported kind.
          ValueError: a file or field does not make a valid tokenizer; the message names it.
        """
        path = Path(path)
        if path.is_dir():
            return cls._from_directory(path, strftime_now)
        return cls.from_gguf(Metadata(path, open_first(path)), strftime_now=strftime_now)

    @classmethod
    def open_if_any(cls, directory: Path) -> "Tokenizer | None":
        """Open the tokenizer of a directory; None where it holds none of a supported kind.

        Raises:
          ValueError: a file or field does not make a valid tokenizer; the message names it.
        """
        try:
            return cls.open(directory)
        except NoTokenizer:
            return None

    @classmethod
    def from_gguf(
        cls,
        meta: Metadata,
        *,
        strftime_now: Callable[[str], str] = strftime_now,
    ) -> "Tokenizer":
        """Make the tokenizer of a GGUF file that is already open: reading its index takes a
        second."""
        return cls(
            tokenizer_gguf.build_tokenizer(meta),
            eos_token_ids=eos_token_ids(meta),
            chat_template=tokenizer_gguf.chat_templates(meta),
            special_tokens=tokenizer_gguf.named_tokens(meta),
            strftime_now=strftime_now,
        )

    @classmethod
    def _from_directory(cls, path: Path, strftime_now: Callable[[str], str]) -> "Tokenizer":
        parts = read_tokenizer(path)
        ends = end_token_ids(
            path,
            parts.special_tokens.get("eos_token"),
            lambda text: None if text in parts.implied else parts.backend.token_to_id(text),
        )
        with failures_named(f"{path / TOKENIZER_FILE}: decoder"):
            return cls(
                parts.backend,
                eos_token_ids=ends,
                chat_template=parts.chat_templates,
                special_tokens=parts.special_tokens,
                implied_tokens=parts.implied,
                strftime_now=strftime_now,
            )

    @property
    def bos_token(self) -> str | None:
        """The text of the token that begins a text."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The text of the token that ends a text."""
        return self.special_tokens.get("eos_token")

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The source of the chat template, or sources by name, or None."""
        return self._templates.sources

    @property
    def vocab_size(self) -> int:
        """Number of ids that the tokenizer knows; the vocabulary of a model may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of the control tokens, which `decode` skips by default."""
        return self._detokenizer.special_ids

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written as `text`; None if there is none."""
        return self._backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Cut `text` into token ids.

        `add_special_tokens` adds the tokens that the model expects around a text, such as a BOS.

        Raises:
          ValueError: `text` is not a string, or has no UTF-8.
        """
        if not isinstance(text, str):
            raise ValueError(f"prompt={shown(text)}: must be a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt: {text[error.start]!r} at {error.start} is half a character; must be text "
                "that has a UTF-8"
            ) from error
        with failures_named("prompt: the tokenizer can't cut it"):
            if len(text) < _LONG:
                return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            # Batches alone let go of the interpreter's lock: other threads drive the engines.
            [cut] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return cut.ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD, at most one a byte.

        Raises:
          ValueError: an id is not an integer, 0 or more.
        """
        with failures_named("token ids: they can't be decoded"):
            return self._detokenizer.decode(ids, skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Iterable[Any] | None = None,
        documents: Iterable[Any] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render a conversation and cut it into token ids, ready for the assistant's answer.

        Args:
          messages, add_generation_prompt, tools, documents, chat_template: see
            `chat_template.ChatTemplates.render`.
          chat_template_kwargs: further variables that the template reads.

        Raises:
          ValueError: there is no template, `messages` is not a list of messages, a message lacks a
            role or has no other key, or the template refuses the messages.
        """
        text = self._templates.render(
            messages, add_generation_prompt, tools, documents, chat_template, chat_template_kwargs
        )
        return self.encode(text, add_special_tokens=False)  # the template writes special tokens

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Iterable[Any] | None = None,
        documents: Iterable[Any] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """Render the text that `apply_chat_template` encodes; the template reads `variables`."""
        return self._templates.render(
            messages, add_generation_prompt, tools, documents, chat_template, variables
        )

    def to_json(self) -> str:
        """The vocabulary and its rules, as the tokenizers package writes them."""
        return self._backend.to_str()

    def incremental_decoder(
        self,
        skip_special_tokens: bool = True,
        after: Sequence[int] = (),
        shown: Iterable[int] = (),
    ) -> IncrementalDecoder:
        """Make a decoder for a stream of tokens that follows the tokens `after`, such as a
        prompt. Control tokens of `shown` are not skipped."""
        return IncrementalDecoder(self._detokenizer, skip_special_tokens, after, shown)

    def save(self, directory: Path) -> None:
        """Write the files from which `open(directory)` makes an equal tokenizer.

        `directory` exists; its tokenizer and generation files are overwritten.
        """
        self._backend.save(str(directory / TOKENIZER_FILE))
        templates: Any = self.chat_template
        if isinstance(templates, dict):
            templates = [{"name": name, "template": text} for name, text in templates.items()]
        config = {
            "tokenizer_class": "TokenizersBackend",
            **self.special_tokens,
            "added_tokens_decoder": {},
            COMPLETE: True,
            IMPLIED: self._implied or None,
            "chat_template": templates,
            "split_special_tokens": self._backend.encode_special_tokens or None,
        }
        known = {key: value for key, value in config.items() if value is not None}
        (directory / CONFIG_FILE).write_text(json.dumps(known, indent=2) + "\n")
        generation = {"eos_token_id": list(self.eos_token_ids)}
        (directory / GENERATION_FILE).write_text(json.dumps(generation, indent=2) + "\n")
