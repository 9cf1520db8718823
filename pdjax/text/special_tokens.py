"""Reads the control tokens and other added tokens of a Hugging Face directory from all its files.

The order of precedence is that of transformers 5. `tokenizer_config.json` may list added tokens
(`added_tokens_decoder`); the other files count only where it doesn't. A token's flags come from the
file that lists it: they say whether it takes the spaces beside it, whether decoding skips it, and
so on.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from pdjax.core.messages import shown
from pdjax.formats.json_file import failures_named, read_json

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Control tokens that any tokenizer may have, in the order in which they are added."""

_EXTRA, _ADDITIONAL = "extra_special_tokens", "additional_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = str | AddedToken


class SpecialTokens:
    """The tokens that a directory adds to a vocabulary.

    Args:
      directory: holds the files.
      config: content of `tokenizer_config.json`.
      defaults: named tokens of the tokenizer's class, used where no file names them.
      in_file: `added_tokens` of `tokenizer.json`, or None without such a file.

    Raises:
      ValueError: an entry is not a token; the message names file and field.
    """

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        defaults: Mapping[str, str],
        in_file: Iterable[Any] | None,
    ) -> None:
        self._where = directory / CONFIG_FILE
        self._values = dict(config)
        if _ADDITIONAL in self._values and not self._values.get(_EXTRA):
            self._values[_EXTRA] = self._values.pop(_ADDITIONAL)
        self._custom: dict[str, Any] = {}
        for name in [name for name, value in self._values.items() if isinstance(value, str)]:
            if _is_custom(name):
                self._custom[name] = self._values.pop(name)
        self._take_mapping()
        self.listed: dict[int, AddedToken] = {}
        if "added_tokens_decoder" in self._values:
            self._read_listed()
        else:
            self._read_older_files(directory, in_file)
        self.named = self._read_named(defaults)
        self.extra = self._read_extra()

    def mark(self, tokens: list[AddedToken]) -> None:
        """Take the tokens that the vocabulary marks as extra ones, unless a file lists extra
        tokens."""
        if _EXTRA not in self._values:
            self.extra = [*tokens]

    def name(self, defaults: Mapping[str, str]) -> None:
        """Name control tokens that no file names."""
        for key, text in defaults.items():
            if key not in self._values:
                self.named.setdefault(key, text)

    def match_raw_text(self) -> None:
        """Make listed tokens match the raw text, before its spaces are changed."""
        for index, token in self.listed.items():
            flags = {name: getattr(token, name) for name in _FLAGS}
            self.listed[index] = AddedToken(token.content, **{**flags, "normalized": False})

    @property
    def texts(self) -> dict[str, str]:
        """The texts of the named tokens, by name."""
        order = [*NAMED, *(name for name in self.named if name not in NAMED)]
        return {name: _text_of(self.named[name]) for name in order if name in self.named}

    def implied(self, backend: Tokenizer) -> frozenset[str]:
        """Return the named tokens that no file names and that `backend` does not hold yet."""
        unnamed = {text for name, text in self.texts.items() if name not in self._values}
        listed = {token.content for token in self.listed.values()} | set(self._custom.values())
        return frozenset(text for text in unnamed - listed if backend.token_to_id(text) is None)

    def add_to(self, backend: Tokenizer, again: bool) -> None:
        """Add all tokens to a vocabulary: first listed tokens by id, then named and extra ones.

        Args:
          again: whether each control token is then added as a special token, whatever its flags.

        Raises:
          ValueError: the vocabulary can't take them.
        """
        known = backend.get_added_tokens_decoder()
        new: list[Token] = [token for _, token in sorted(self.listed.items())]
        texts = {token.content for token in known.values()} | {_text_of(token) for token in new}
        named = self.texts
        for token in [*(self.named[name] for name in named), *self.extra]:
            if _text_of(token) not in texts and token not in new:
                new.append(token)
        with failures_named(f"{self._where}: these tokens can't be added"):
            added = [_as_special(token, set(named.values())) for token in new]
            backend.add_tokens(added)
            if again:
                control = dict.fromkeys([*named.values(), *map(_text_of, self.extra)])
                backend.add_tokens([AddedToken(text, special=True) for text in control])
            _keep_special(backend, [*known.values(), *added])

    def put_around(self, backend: Tokenizer, by_config: bool, begins: bool) -> None:
        """Set the tokens before and behind a text, unless the vocabulary's file sets them.

        Args:
          by_config: whether `add_bos_token` and `add_eos_token` of `tokenizer_config.json` count.
          begins: whether the tokenizer's class puts the BOS before a text.

        Raises:
          ValueError: the vocabulary lacks such a token.
        """
        added: dict[str, Any] = {"bos_token": True} if begins else {}
        for name in ("bos_token", "eos_token"):
            if by_config and f"add_{name}" in self._values:
                added[name] = self._values[f"add_{name}"]
        if not added and backend.post_processor is not None:
            return
        texts = self.texts
        bos, eos = (texts.get(n) if added.get(n) else None for n in ("bos_token", "eos_token"))
        parts = [f"{bos}:0"] * (bos is not None) + ["$A:0"] + [f"{eos}:0"] * (eos is not None)
        ids = [(text, backend.token_to_id(text)) for text in (bos, eos) if text is not None]
        with failures_named(f"{self._where}: add_bos_token, add_eos_token: no such template"):
            backend.post_processor = processors.TemplateProcessing(
                single=" ".join(parts), special_tokens=ids
            )

    def _take_mapping(self) -> None:
        """Move extra tokens that have names to the custom tokens."""
        if isinstance(self._values.get(_EXTRA), dict):
            self._custom.update(self._values.pop(_EXTRA))

    def _read_listed(self) -> None:
        listed = self._values["added_tokens_decoder"]
        if not isinstance(listed, dict):
            raise ValueError(
                f"{self._where}: added_tokens_decoder={shown(listed)}: must be an object of tokens"
            )
        for index, token in listed.items():
            self._list(self._where, "added_tokens_decoder", index, token)

    def _read_older_files(self, directory: Path, in_file: Iterable[Any] | None) -> None:
        if (directory / SPECIAL_FILE).is_file():
            self._read_special_file(directory / SPECIAL_FILE)
        if (directory / ADDED_FILE).is_file():
            control = [self._values.get(name) for name in NAMED] + self._extra_values()
            texts = {_text_of(token) for token in control if isinstance(token, Token)}
            for text, index in read_json(directory / ADDED_FILE).items():
                special = text in texts
                token = {"content": text, "normalized": not special, "special": special}
                self._list(directory / ADDED_FILE, shown(text), index, token)
        for token in in_file or ():
            if not isinstance(token, dict) or "id" not in token:
                raise ValueError(
                    f"{directory / 'tokenizer.json'}: added_tokens: {shown(token)}: must be an "
                    "object with an id"
                )
            plain = {key: value for key, value in token.items() if key != "id"}
            self._list(directory / "tokenizer.json", "added_tokens", token["id"], plain)

    def _read_special_file(self, path: Path) -> None:
        for name, value in read_json(path).items():
            if name == _EXTRA and isinstance(value, list):
                found = [_token(path, name, token, special=True) for token in value]
                value = self._extra_values()
                value += [token for token in found if token not in value]
            elif isinstance(value, dict) and name != _EXTRA:
                value = _token(path, name, value, special=True)
            self._values[name] = value
        self._take_mapping()

    def _extra_values(self, name: str = _EXTRA) -> list[Any]:
        extra = self._values.get(name)
        if extra is not None and not isinstance(extra, list):
            raise ValueError(f"{self._where}: {name}={shown(extra)}: must be a list of tokens")
        return list(extra or ())

    def _list(self, path: Path, name: str, index: Any, token: Any) -> None:
        place = int(index) if isinstance(index, str) and index.isdecimal() else index
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < 1 << 32:
            raise ValueError(f"{path}: {name}: {shown(index)} is no token id")
        if not isinstance(token, dict):
            raise ValueError(f"{path}: {name}: {shown(token)}: must be an object with a content")
        self.listed[place] = _token(path, name, token)

    def _read_named(self, defaults: Mapping[str, str]) -> dict[str, Token]:
        by_text = {token.content: token for token in self.listed.values()}
        named: dict[str, Token] = {}
        for name in NAMED:
            value = self._values.get(name, defaults.get(name))
            if value is not None:
                token = _token(self._where, name, value)
                in_files = name in self._values
                named[name] = by_text.get(_text_of(token), token) if in_files else token
        custom = {
            name: value
            for name, value in self._values.items()
            if _is_custom(name) and isinstance(value, str | AddedToken | dict)
        }
        known = {*NAMED, *self._values}
        implied = {name: text for name, text in defaults.items() if name not in known}
        for name, value in {**implied, **custom, **self._custom}.items():
            named[name] = _token(self._where, name, value)
        return named

    def _read_extra(self) -> list[Token]:
        extra = self._extra_values(_EXTRA if _EXTRA in self._values else _ADDITIONAL)
        return [_token(self._where, _EXTRA, token) for token in extra]


def _is_custom(name: str) -> bool:
    return name.endswith("_token") and name not in NAMED and not name.startswith("add_")


def _token(path: Path, name: str, value: Any, special: bool | None = None) -> Any:
    """Read a token from a file: a string as it is, or an object with flags."""
    if isinstance(value, Token):
        return value
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str):
        raise ValueError(
            f"{path}: {name}={shown(value)}: must be a string, or an object with one as its content"
        )
    flags = {key: flag for key, flag in value.items() if key not in ("content", "__type")}
    for key, flag in flags.items():
        if key not in _FLAGS or not isinstance(flag, bool):
            raise ValueError(
                f"{path}: {name}: {key}={shown(flag)}; allowed: true or false for "
                f"{', '.join(_FLAGS)}"
            )
    if special is not None:
        flags["special"] = special
    return AddedToken(content, **flags)


def _keep_special(backend: Tokenizer, earlier: Iterable[AddedToken]) -> None:
    """Flag every token as special that was ever added as special.

    The tokenizers package keeps skipping such a token when it decodes, even after the token is
    added again without the flag. A saved vocabulary keeps only the last flag.
    """
    ever_special = {token.content for token in earlier if token.special}
    for token in backend.get_added_tokens_decoder().values():
        if token.content in ever_special and not token.special:
            token.special = True
            backend.add_tokens([token])


def _as_special(token: Token, named: set[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not token.special and token.content in named:
        token.special = True
    return token


def _text_of(token: Token) -> str:
    return token if isinstance(token, str) else token.content
