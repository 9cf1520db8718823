"""Text to token ids and back, chat templates included, also piece by piece while tokens stream in.

Reads the tokenizer of a Hugging Face directory (`tokenizer.json` and its companions) or of a GGUF
file. Lives on the host: nothing here knows of arrays or devices.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from pdjax import tokenizer_gguf
from pdjax.clock import strftime_now
from pdjax.end_tokens import GENERATION_FILE, end_token_ids
from pdjax.json_file import read_json

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"

Message = Mapping[str, Any]
"""One turn of a conversation: at least "role" and "content"."""


class Tokenizer:
    """A vocabulary, its rules, and a chat template.

    Attributes:
      eos_token_ids: tokens that end a text or a turn, as the model's files say.
      chat_template: Jinja source, or None.
      bos_token, eos_token: texts that a chat template may use, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        strftime_now: Callable[[str], str] = strftime_now,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_token_ids = tuple(eos_token_ids)
        self.chat_template = chat_template
        self.bos_token = bos_token
        self.eos_token = eos_token
        self._strftime_now = strftime_now
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def open(
        cls, path: str | Path, *, strftime_now: Callable[[str], str] = strftime_now
    ) -> "Tokenizer":
        """The tokenizer of a GGUF file, or of a directory that holds `tokenizer.json`.

        `strftime_now` formats the date for chat templates that print one.

        Raises:
          ValueError: naming the file that is missing or cannot be read.
        """
        path = Path(path)
        if path.is_dir():
            return cls._from_directory(path, strftime_now)
        meta = tokenizer_gguf.Metadata(path, tokenizer_gguf.open_gguf(path))
        return cls.from_gguf(meta, strftime_now=strftime_now)

    @classmethod
    def from_gguf(
        cls,
        meta: tokenizer_gguf.Metadata,
        *,
        strftime_now: Callable[[str], str] = strftime_now,
    ) -> "Tokenizer":
        """The tokenizer of a GGUF file that is open already: reading its index takes a second."""
        return cls(
            tokenizer_gguf.build_tokenizer(meta),
            eos_token_ids=tokenizer_gguf.eos_token_ids(meta),
            chat_template=meta.text("tokenizer.chat_template", "") or None,
            bos_token=tokenizer_gguf.special_token(meta, "bos"),
            eos_token=tokenizer_gguf.special_token(meta, "eos"),
            strftime_now=strftime_now,
        )

    @classmethod
    def _from_directory(cls, path: Path, strftime_now: Callable[[str], str]) -> "Tokenizer":
        file = path / TOKENIZER_FILE
        if not file.is_file():
            raise ValueError(f"model={str(path)!r}: {TOKENIZER_FILE} is missing")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the tokenizers package raises bare Exception
            raise ValueError(
                f"{file}: not a readable tokenizer ({' '.join(str(error).split())})"
            ) from error
        config = read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
        eos_token = _token_text(path, config, "eos_token")
        return cls(
            backend,
            eos_token_ids=end_token_ids(path, eos_token, backend.token_to_id),
            chat_template=_template_of(path, config),
            bos_token=_token_text(path, config, "bos_token"),
            eos_token=eos_token,
            strftime_now=strftime_now,
        )

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows; the vocabulary of a model may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Control tokens, which `decode` skips unless told otherwise."""
        return self._special_ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` puts what the model expects around a text, such
        as a BOS.
        """
        if not isinstance(text, str):
            raise ValueError(f"prompt={text!r}: must be a string")
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        Raises:
          ValueError: there is no template, `messages` is no list of messages, a message lacks a
            role or content or has one that is no string, or the template refuses the messages.
        """
        text = self.render_chat(messages, add_generation_prompt)
        return self.encode(text, add_special_tokens=False)  # the template writes its own

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text that `apply_chat_template` encodes."""
        if self.chat_template is None:
            raise ValueError(
                "chat: this model's tokenizer has no chat template; use generate instead"
            )
        _check_messages(messages)
        try:
            return (
                self._environment()
                .from_string(self.chat_template)
                .render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    bos_token=self.bos_token or "",
                    eos_token=self.eos_token or "",
                )
            )
        except Exception as error:  # a template is a program: it may fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"messages: the chat template refuses them ({reason})") from error

    def _environment(self) -> jinja2.Environment:
        """Templates come with downloaded models, so they run in Jinja's sandbox."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        environment.globals["raise_exception"] = _raise_in_template
        environment.globals["strftime_now"] = self._strftime_now
        return environment

    def incremental_decoder(
        self, skip_special_tokens: bool = True, after: Sequence[int] = ()
    ) -> "IncrementalDecoder":
        """A fresh decoder for a stream of tokens that goes on `after` others, such as a prompt."""
        return IncrementalDecoder(self, skip_special_tokens, after)

    def save(self, directory: Path) -> None:
        """Write the files from which `open(directory)` makes an equal tokenizer."""
        self._backend.save(str(directory / TOKENIZER_FILE))
        config = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "chat_template": self.chat_template,
        }
        known = {key: value for key, value in config.items() if value is not None}
        (directory / CONFIG_FILE).write_text(json.dumps(known, indent=2) + "\n")
        generation = {"eos_token_id": list(self.eos_token_ids)}
        (directory / GENERATION_FILE).write_text(json.dumps(generation, indent=2) + "\n")


class IncrementalDecoder:
    """Turns a stream of token ids into text that never has to be taken back.

    A character may take several tokens, and a token's text may depend on its left neighbour
    (SentencePiece's spaces). So the decoder keeps a short window: tokens already shown, as context,
    and tokens held back because the text so far ends inside a character. Each push decodes the
    window only (the two-offset method of Hugging Face's text-generation-inference).
    """

    _MAX_HELD = 16
    """Tokens held back at most: bytes that never become a character must not make the window grow.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        after: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        seen = [token for token in after[-self._MAX_HELD :] if token not in self._skipped]
        whole = not self._decode(seen).endswith("\ufffd")  # it does not end inside a character
        self._shown: list[int] = seen if whole else []  # context: tokens whose text is out
        self._held: list[int] = []
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Take a new token; the text that has become certain, possibly empty."""
        if token_id in self._skipped:
            return ""
        self._held.append(token_id)
        if len(self._held) <= self._MAX_HELD and self._decode(self._shown + self._held).endswith(
            "\ufffd"
        ):
            return ""
        return self._emit()

    def flush(self) -> str:
        """End of the stream: the text still held back, with U+FFFD for what is no character."""
        return self._emit() if self._held else ""

    def _emit(self) -> str:
        before, after = self._decode(self._shown), self._decode(self._shown + self._held)
        new = after[len(before) :]
        if new:
            self._shown = self._held
        else:  # no text of its own: stays context of what follows
            self._shown = (self._shown + self._held)[-self._MAX_HELD :]
        self._held = []
        self._pieces.append(new)
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _template_of(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / TEMPLATE_FILE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not readable text ({error})") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        if not all(isinstance(e, dict) and {"name", "template"} <= set(e) for e in template):
            raise ValueError(
                f"{directory / CONFIG_FILE}: chat_template={template!r}: each entry of a list must "
                "have a name and a template"
            )
        template = next((e["template"] for e in template if e["name"] == "default"), None)
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"{directory / CONFIG_FILE}: chat_template={template!r}: must be a string, or a list "
            "of named ones"
        )
    return template


def _token_text(directory: Path, config: dict[str, Any], name: str) -> str | None:
    token = config.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"{directory / CONFIG_FILE}: {name}={token!r}: must be a string, or an object with one "
            "as its content"
        )
    return text


def _check_messages(messages: object) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages={messages!r}: must be a list of at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"messages: {message!r} must be a mapping with 'role' and 'content'")
        for name in ("role", "content"):
            if not isinstance(message[name], str):
                raise ValueError(f"messages: {name}={message[name]!r}: must be a string")


def _raise_in_template(message: str) -> None:
    raise jinja2.TemplateError(message)
