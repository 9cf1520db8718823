"""Reads the tokenizer of a Hugging Face directory by the rules of transformers 5.

tokenizer.json              vocabulary, rules and added tokens; or
vocab.json, merges.txt      the vocabulary of a byte-level class; or
tokenizer.model             a SentencePiece model
tokenizer_config.json       class, named control tokens, added tokens, chat template
special_tokens_map.json, added_tokens.json
                            further tokens; see special_tokens.py
chat_template.jinja, additional_chat_templates/
                            chat templates, which override the config's
chat_template.json          the template of a processor, where there is no other
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, models

from pdjax.core.messages import shown
from pdjax.formats.json_file import (
    failures_named,
    parse_json,
    read_field,
    read_json,
    read_json_if_any,
    read_text,
)
from pdjax.formats.sentencepiece_model import USER_DEFINED, read_sentencepiece
from pdjax.text import tokenizer_families as families
from pdjax.text.end_tokens import MODEL_FILE, end_token_ids
from pdjax.text.special_tokens import CONFIG_FILE, SpecialTokens

TOKENIZER_FILE = "tokenizer.json"
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
SENTENCEPIECE_FILE = "tokenizer.model"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
PROCESSOR_TEMPLATE_FILE = "chat_template.json"

IMPLIED = "implied_tokens"
"""A field that pdjax writes into a config: tokens that only the tokenizer's class names."""

COMPLETE = "added_tokens_complete"
"""A field that pdjax writes into a config: tokenizer.json holds every added token with its flags,
so a token that the config names does not become a control token."""

_OTHER_VOCABULARIES = ("tekken.json", "tiktoken.model", "vocab.txt", "spiece.model", VOCAB_FILE)
"""Vocabulary files that an error names where no supported file is found."""


class NoTokenizer(ValueError):
    """A directory holds no tokenizer of a supported kind; the model still takes token ids."""


class TokenizerParts(NamedTuple):
    """The parts of a directory's tokenizer.

    Attributes:
      backend: vocabulary and rules.
      special_tokens: texts of control tokens by their names, such as "bos_token".
      implied: texts of tokens that only the tokenizer's class names; the model has never seen them.
      chat_templates: source, or sources by name, or None.
    """

    backend: Tokenizer
    special_tokens: dict[str, str]
    implied: frozenset[str]
    chat_templates: str | dict[str, str] | None


def read_tokenizer(directory: Path) -> TokenizerParts:
    """Read the tokenizer of a directory.

    Raises:
      NoTokenizer: there is none of a supported kind.
      ValueError: a file or field does not make a valid tokenizer; the message names it.
    """
    config = read_json_if_any(directory / CONFIG_FILE)
    model = read_json_if_any(directory / MODEL_FILE)
    path = directory / TOKENIZER_FILE
    text = read_text(path) if path.is_file() else None
    family = families.choose_family(
        read_field(directory / MODEL_FILE, model, "model_type", str, "a string"),
        read_field(directory / CONFIG_FILE, config, "tokenizer_class", str, "a string"),
        read_field(directory / MODEL_FILE, model, "tokenizer_class", str, "a string"),
        byte_level='"ByteLevel"' in (text or ""),
    )
    rules = families.Rules(
        read_field(directory / CONFIG_FILE, config, "add_prefix_space", bool, "true or false"),
        read_field(directory / CONFIG_FILE, config, "legacy", bool, "true or false"),
        "legacy" in config,
        _unknown_token(config),
    )
    if text is not None:
        backend, tokens = _from_tokenizer_file(path, text, config, family, rules)
    elif (directory / SENTENCEPIECE_FILE).is_file() and family in (None, *families.SENTENCEPIECE):
        backend, tokens = _from_sentencepiece(directory, config, family, rules)
    elif (directory / VOCAB_FILE).is_file() and family not in (None, *families.SENTENCEPIECE):
        backend, tokens = _from_vocabulary(directory, config, str(family), rules)
    else:
        raise NoTokenizer(_why_none(directory, family))
    stored = read_field(directory / CONFIG_FILE, config, IMPLIED, list, "a list of texts") or []
    implied = tokens.implied(backend) | {text for text in stored if isinstance(text, str)}
    of_class = families.Family({}) if family is None else families.FAMILIES[family]
    if not read_field(directory / CONFIG_FILE, config, COMPLETE, bool, "true or false"):
        tokens.add_to(backend, again=of_class.named_again)
    tokens.put_around(backend, by_config=text is None, begins=of_class.begins)
    split = read_field(
        directory / CONFIG_FILE, config, "split_special_tokens", bool, "true or false"
    )
    backend.encode_special_tokens = bool(split)
    templates = read_chat_templates(directory, config)
    return TokenizerParts(backend, tokens.texts, implied, templates)


def listed_end_token_ids(directory: Path) -> tuple[int, ...]:
    """Return the end tokens of a directory without a supported tokenizer.

    The ids come from the files that list tokens.

    Raises:
      ValueError: an entry is not a token; the message names file and field.
    """
    tokens = SpecialTokens(directory, read_json_if_any(directory / CONFIG_FILE), {}, None)
    vocabulary = read_json_if_any(directory / VOCAB_FILE)
    ids = {
        text: index
        for text, index in vocabulary.items()
        if type(index) is int and 0 <= index < 1 << 31
    }
    ids |= {token.content: index for index, token in tokens.listed.items()}
    return end_token_ids(directory, tokens.texts.get("eos_token"), ids.get)


def _from_tokenizer_file(
    path: Path, text: str, config: dict[str, Any], family: str | None, rules: families.Rules
) -> tuple[Tokenizer, SpecialTokens]:
    with failures_named(f"{path}: not a readable tokenizer"):
        stored = Tokenizer.from_str(text) if family is None else None
    unread = stored is not None and "added_tokens_decoder" in config
    content: dict[str, Any] = {} if unread else parse_json(path, text)
    added = content.get("added_tokens", [])
    if not isinstance(added, list):
        raise ValueError(f"{path}: added_tokens={shown(added)}: must be a list")
    with failures_named(f"{path}: not a readable tokenizer"):
        if stored is None:
            backend = families.read_family(str(family), content, rules)
            stored = Tokenizer.from_str(_without_vocabulary(content))
            if stored.post_processor is not None:
                backend.post_processor = stored.post_processor
        else:
            backend = stored
    if stored.padding is not None:  # padding names a token
        config = {"pad_token": stored.padding["pad_token"], **config}
    tokens = SpecialTokens(path.parent, config, _defaults(family), added)
    return backend, tokens


def _without_vocabulary(content: Mapping[str, Any]) -> str:
    """Return a tokenizer.json that keeps only the post-processor and the padding."""
    kept = {name: content.get(name) for name in ("version", "post_processor", "padding")}
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    others = ("truncation", "normalizer", "pre_tokenizer", "decoder")
    return json.dumps({**kept, **dict.fromkeys(others), "added_tokens": [], "model": empty})


def _from_sentencepiece(
    directory: Path, config: dict[str, Any], family: str | None, rules: families.Rules
) -> tuple[Tokenizer, SpecialTokens]:
    path = directory / SENTENCEPIECE_FILE
    model = read_sentencepiece(path)
    tokens = SpecialTokens(directory, config, _defaults(family), None)
    marked = families.marked_pieces(model)
    with failures_named(f"{path}: not a readable tokenizer"):
        if family is not None:
            backend = families.llama_from_sentencepiece(family, model, rules)
        else:
            names = {index: token.content for index, token in tokens.listed.items()}
            backend = families.from_sentencepiece(model, names, rules)
            whole = {piece.text for piece in model.pieces if piece.kind == USER_DEFINED}
            marked = [token for token in marked if token.content not in whole]
            tokens.name(families.names_of_pieces(model))
            if model.add_dummy_prefix:
                tokens.match_raw_text()
    tokens.mark(marked)
    return backend, tokens


def _from_vocabulary(
    directory: Path, config: dict[str, Any], family: str, rules: families.Rules
) -> tuple[Tokenizer, SpecialTokens]:
    if not (directory / MERGES_FILE).is_file():
        raise NoTokenizer(f"{directory}: {MERGES_FILE} is missing")
    with failures_named(f"{directory / VOCAB_FILE}: not a readable tokenizer"):
        vocab, merges = models.BPE.read_file(
            str(directory / VOCAB_FILE), str(directory / MERGES_FILE)
        )
        backend = families.build_family(family, vocab, merges, rules)
    return backend, SpecialTokens(directory, config, _defaults(family), None)


def _unknown_token(config: dict[str, Any]) -> str:
    token = config.get("unk_token", "<unk>")
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else str(None)


def _defaults(family: str | None) -> dict[str, str]:
    return {} if family is None else families.FAMILIES[family].defaults


def _why_none(directory: Path, family: str | None) -> str:
    found = [name for name in _OTHER_VOCABULARIES if (directory / name).is_file()]
    if not found:
        return f"{directory}: {TOKENIZER_FILE} is missing"
    return (
        f"{directory}: {TOKENIZER_FILE} is missing, and {found[0]} is not read for "
        f"tokenizer_class={family!r}; allowed: {SENTENCEPIECE_FILE}, or {VOCAB_FILE} with "
        f"{MERGES_FILE} for GPT2Tokenizer, Qwen2Tokenizer and GPTNeoXTokenizer"
    )


def read_chat_templates(directory: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """Read the chat template of a directory, or several by name, or None.

    Raises:
      ValueError: a file can't be read, or a field is not a template; the message names it.
    """
    files = {}
    if (directory / TEMPLATE_FILE).is_file():
        files["default"] = read_text(directory / TEMPLATE_FILE)
    if (directory / TEMPLATE_FOLDER).is_dir():
        for path in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja")):
            files[path.name.removesuffix(".jinja")] = read_text(path)
    if files:
        return files["default"] if files.keys() == {"default"} else files
    found = _templates(directory / CONFIG_FILE, config.get("chat_template"))
    if found is None and (directory / PROCESSOR_TEMPLATE_FILE).is_file():
        path = directory / PROCESSOR_TEMPLATE_FILE
        found = _templates(path, read_json(path).get("chat_template"))
    return found


def _templates(path: Path, value: Any) -> str | dict[str, str] | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [{"name": name, "template": source} for name, source in value.items()]
    if not isinstance(value, list):
        raise ValueError(
            f"{path}: chat_template={shown(value)}: must be a string, or a list of named ones"
        )
    named = {}
    for entry in value:
        name, source = (
            (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        )
        if not isinstance(name, str) or not isinstance(source, str):
            raise ValueError(
                f"{path}: chat_template={shown(value)}: each entry of a list must have a name and "
                "a template"
            )
        named[name] = source
    return named
