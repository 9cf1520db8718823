"""Loads a config from a file or by a preset's name, and overrides fields by dotted names:
`{"decode.rows": 8}`."""

import ast
import contextlib
import dataclasses
import importlib.util
import sys
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdjax.config import Config
from pdjax.config.checks import as_text, check_type, kinds, path
from pdjax.config.names import did_you_mean
from pdjax.config.presets import PRESETS
from pdjax.core.messages import shown

_SWITCH = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
"""How a flag's boolean may be written, as absl reads it; in any case."""
_MOST_TEXT = 2000
"""Most characters of a value that is read as a literal: long ones can overwhelm Python's parser."""
_MOST_REASON = 300
_DEEPEST = 8
"""Most parts of a dotted name; no field is nested this deep."""
_FIELDS_FOR_A_MODEL = (
    ("model", "spec"),
    ("model", "max_model_len"),
    ("prefill", "page_buckets"),
    ("decode", "page_buckets"),
)
"""Fields with values that suit only the config's own model, or its context length."""


def load_config(
    source: "str | Path | Config", overrides: Mapping[str, Any] | None = None
) -> Config:
    """Load a Config and override its fields.

    A config's `model.max_model_len` and page buckets suit the model that it names. If `overrides`
    name another `model.source`, these fields become None and follow that model's context, except
    those that `overrides` name, too.

    Args:
      source: a Config, a preset's name, or a Python file with `get_config()`. What the file prints
        goes to stderr.
      overrides: dotted field names to values; a string is read as the field's type.

    Raises:
      ValueError: no such file or preset, a file that fails or has no `get_config`, an unknown
        field, a value of another type or out of range.
    """
    if isinstance(source, Config):
        config = source
    elif isinstance(source, str) and source in PRESETS:
        config = PRESETS[source]()
    elif isinstance(source, (str, Path)):
        config = _config_of_file(Path(source))
    else:
        raise ValueError(
            f"config={shown(source)}: must be a Config, a Python file or a preset's name; presets "
            f"are {', '.join(PRESETS)}"
        )
    if overrides is not None and not isinstance(overrides, Mapping):
        raise ValueError(f"overrides={shown(overrides)}: must be a mapping of names to values")
    tree: dict[str, Any] = {}
    for name, value in (overrides or {}).items():
        _place(tree, name, name, value)
    _reset_for_another_model(config, tree)
    # All overrides apply at once, since fields that constrain each other must change together.
    return _replace(config, tree, "")


def is_switch(name: str) -> bool:
    """Whether the dotted name is that of a field that is true or false, or may be None."""
    hint: Any = Config
    for part in name.split("."):
        parts = [kind for kind in kinds(hint) if dataclasses.is_dataclass(kind)]
        hints = typing.get_type_hints(parts[0]) if parts else {}
        if part not in hints:
            return False
        hint = hints[part]
    return bool in kinds(hint)


def _place(tree: dict[str, Any], name: Any, whole: Any, value: Any) -> None:
    """Put a value into a tree of fields under a dotted name.

    `whole` is the dotted name from the root of the tree; messages show it.
    """
    if not isinstance(name, str) or not isinstance(whole, str):
        raise ValueError(f"{shown(name)}: must be the name of a field, such as 'decode.rows'")
    if whole.count(".") >= _DEEPEST:
        raise ValueError(f"{shown(whole)}: no such field")
    *parents, leaf = name.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{_named(whole)}: {_named(parent)} is overridden as a whole, too")
    if not isinstance(value, Mapping):
        if leaf in tree:
            raise ValueError(f"{_named(whole)}: overridden as a whole, and fields of it, too")
        tree[leaf] = value
        return
    fields = tree.setdefault(leaf, {})
    if not isinstance(fields, dict):
        raise ValueError(f"{_named(whole)}: overridden as a whole, and fields of it, too")
    for key, each in value.items():
        _place(fields, key, f"{whole}.{key}" if isinstance(key, str) else key, each)


def _named(name: str) -> str:
    """Show a dotted name in a message, quoted unless it is a short chain of ASCII identifiers."""
    plain = all(part.isidentifier() and part.isascii() for part in name.split("."))
    return name if plain and len(name) < 100 else shown(name)


def _reset_for_another_model(config: Config, tree: dict[str, Any]) -> None:
    """If the overrides name another model, set the fields that suit only the config's own to None.

    Fields that the overrides name keep the override.
    """
    model = tree.get("model")
    source = model.get("source") if isinstance(model, dict) else None
    if not isinstance(source, str | Path) or str(source) == config.model.source:
        return
    for owner, leaf in _FIELDS_FOR_A_MODEL:
        fields = tree.setdefault(owner, {})
        if isinstance(fields, dict):
            fields.setdefault(leaf, None)


def _config_of_file(file: Path) -> Config:
    name = f"config={shown(str(file))}"
    try:
        found = file.suffix == ".py" and file.is_file()
    except (OSError, ValueError):  # no file can have this name, or its folder can't be read
        found = False
    if not found:
        raise ValueError(
            f"{name}: no such Python file, nor a preset's name; presets are {', '.join(PRESETS)}; "
            "a model's name, file or folder is the field model.source of a config"
        )
    module_spec = importlib.util.spec_from_file_location(f"pdjax_config_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # commands print their results on stdout
            module_spec.loader.exec_module(module)
            get_config = getattr(module, "get_config", None)
            config = None if get_config is None else get_config()
    except KeyboardInterrupt:
        raise  # Ctrl-C stops the process, not only the file
    except BaseException as error:
        # The user wrote the file: any failure in it is bad input, even a call of `sys.exit`.
        raise ValueError(f"{name}: {_reason(error)}") from error
    if get_config is None:
        raise ValueError(f"{name}: the file has no get_config()")
    if not isinstance(config, Config):
        raise ValueError(
            f"{name}: get_config() returned {type(config).__name__}, not a pdjax.Config"
        )
    return config


def _reason(error: BaseException) -> str:
    """Describe an exception in one line of bounded length; name its class unless a ValueError."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    if len(text) > _MOST_REASON:
        text = f"{text[:_MOST_REASON]}..."
    plain = isinstance(error, ValueError) and text
    return text if plain else f"{type(error).__name__}: {text}"


def _replace(config: Any, tree: Mapping[str, Any], name: str) -> Any:
    """Replace the fields of `config` that `tree` names. Messages show `name`, its dotted path."""
    hints = typing.get_type_hints(type(config))
    changes = {}
    for leaf, value in tree.items():
        full = path(name, leaf)
        if leaf not in hints:
            raise ValueError(
                f"{_named(full)}: no such field; {type(config).__name__} has {', '.join(hints)}"
                f"{did_you_mean(full)}"
            )
        current = getattr(config, leaf)
        if not isinstance(value, dict):
            changes[leaf] = _parse(value, hints[leaf], full)
        elif dataclasses.is_dataclass(current):
            changes[leaf] = _replace(current, value, full)
        elif value:
            raise ValueError(
                f"{_named(f'{full}.{next(iter(value))}')}: {leaf} has no fields of its own"
            )
        else:
            check_type(value, hints[leaf], full)
    return dataclasses.replace(config, **changes)


def _parse(value: Any, hint: Any, name: str) -> Any:
    """Convert `value` to the type of its field.

    A string field takes text as is; other fields read text as a Python literal. A tuple field makes
    a tuple of a single number.
    """
    allowed = kinds(hint)
    value = as_text(value, hint)
    if isinstance(value, str):
        if value == "None" and type(None) in allowed:
            return None
        if bool in allowed and value.lower() in _SWITCH:
            return _SWITCH[value.lower()]
        if str not in allowed:
            value = _literal(value, name)
    if tuple in allowed and type(value) is int:
        value = (value,)
    check_type(value, hint, name)
    return value


def _literal(text: str, name: str) -> Any:
    """Read text as a Python literal. Other text is returned as is; the field's check refuses it."""
    if len(text) > _MOST_TEXT:
        raise ValueError(f"{name}={shown(text)}: must be at most {_MOST_TEXT} characters")
    try:
        with warnings.catch_warnings(action="ignore"):  # Python warns of text such as "1if"
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
