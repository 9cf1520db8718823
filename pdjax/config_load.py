"""Configs from files and by name, and their fields overridden by dotted names:
`{"decode.rows": 8}`."""

import ast
import contextlib
import dataclasses
import importlib.util
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pdjax.config import Config, ModelConfig
from pdjax.config_checks import check_type, kinds, path

PRESETS: dict[str, Callable[[], Config]] = {
    "smollm2": lambda: Config(model=ModelConfig(max_model_len=1024)),
    "smollm2_colocated": lambda: Config(model=ModelConfig(max_model_len=1024), colocated=True),
}
"""Configs by name: the embedded model, prefill and decode on a device each, or both on one."""


def load_config(
    source: "str | Path | Config", overrides: Mapping[str, Any] | None = None
) -> Config:
    """A Config from a Config, a preset's name, or a Python file with `get_config()`.

    Args:
      overrides: dotted field names to values; a string is read as the field's type.

    Raises:
      ValueError: no such file or preset, a file that fails or has no `get_config`, an unknown
        field, a value of another type or out of range.
    """
    if isinstance(source, Config):
        config = source
    elif str(source) in PRESETS:
        config = PRESETS[str(source)]()
    else:
        config = _config_of_file(Path(source))
    tree: dict[str, Any] = {}
    for name, value in (overrides or {}).items():
        branch = tree
        *parents, leaf = name.split(".")
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise ValueError(f"{name}: {parent} is overridden as a whole, too")
        if leaf in branch:
            raise ValueError(f"{name}: overridden as a whole, and fields of it, too")
        branch[leaf] = value
    # All at once: fields that constrain each other change together.
    return _replace(config, tree, "")


def _config_of_file(file: Path) -> Config:
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(
            f"config={str(file)!r}: no such Python file, nor a preset's name; "
            f"presets are {', '.join(PRESETS)}"
        )
    module_spec = importlib.util.spec_from_file_location(f"pdjax_config_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        config = None if get_config is None else get_config()
    except Exception as error:  # the file is the user's: whatever goes wrong in it is bad input
        reason = " ".join(str(error).split())
        if not isinstance(error, ValueError) or not reason:
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"config={str(file)!r}: {reason}") from error
    if get_config is None:
        raise ValueError(f"config={str(file)!r}: the file has no get_config()")
    if not isinstance(config, Config):
        raise ValueError(
            f"config={str(file)!r}: get_config() returned {type(config).__name__}, "
            "not a pdjax.Config"
        )
    return config


def _replace(config: Any, tree: Mapping[str, Any], name: str) -> Any:
    """`config` with the fields of `tree` replaced; `name` is its own dotted path, for messages."""
    hints = typing.get_type_hints(type(config))
    changes = {}
    for leaf, value in tree.items():
        if leaf not in hints:
            raise ValueError(
                f"{path(name, leaf)}: no such field; {type(config).__name__} has {', '.join(hints)}"
            )
        current, full = getattr(config, leaf), path(name, leaf)
        if isinstance(value, dict) and not dataclasses.is_dataclass(current):
            raise ValueError(f"{full}.{next(iter(value))}: {leaf} has no fields of its own")
        nested = isinstance(value, dict)
        changes[leaf] = (
            _replace(current, value, full) if nested else _parse(value, hints[leaf], full)
        )
    return dataclasses.replace(config, **changes)


def _parse(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type of the field; text is read as a Python literal, or as it stands for a
    string field."""
    if isinstance(value, str):
        allowed = kinds(hint)
        if value == "None" and type(None) in allowed:
            return None
        if str not in allowed:
            # What is no literal stays text, and the check below says what is allowed.
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value)
    check_type(value, hint, name)
    return value
