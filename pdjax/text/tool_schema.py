"""Makes the JSON schema of a Python function, which chat templates show to a model as a tool.

The schema equals that of Hugging Face transformers 5: names, types and defaults come from the
signature, descriptions from a docstring in Google's style.
"""

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

_TYPES: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
_SCALARS = (int, float, str, bool, type(None))
_SECTION = re.compile(r"\s*(Args:|Returns:|Raises:)")
_ARGUMENT = re.compile(r"([ \t]*)(\w+)(?:[ \t]*\([^()\n]*\))?:\s*(.*)")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Make the schema of a function or method.

    Raises:
      ValueError: the function has no docstring, or an argument has no type, a type that JSON lacks,
        or no description.
    """
    name = getattr(function, "__name__", "operation")
    text = (inspect.getdoc(function) or "").strip()
    if not text:
        raise ValueError(f"{name} has no docstring")
    description, arguments, returned = _read_docstring(text)
    properties, required, result = _signature(function, name)
    for argument, schema in properties.items():
        if argument not in arguments:
            raise ValueError(f"the docstring of {name} does not describe {argument!r}")
        _describe(schema, arguments[argument])
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    made: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    if result is not None:
        made["return"] = result if returned is None else {**result, "description": returned}
    return {"type": "function", "function": made}


def _signature(
    function: Callable[..., Any], name: str
) -> tuple[dict[str, Any], list[str], dict[str, Any] | None]:
    """Return the schemas of the arguments, the names without a default, and the result's schema."""
    parameters = dict(inspect.signature(function).parameters)
    first = next(iter(parameters), None)
    if first in ("self", "cls") and parameters[first].annotation is inspect.Parameter.empty:
        del parameters[first]
    for argument, parameter in parameters.items():
        if parameter.annotation is inspect.Parameter.empty:
            raise ValueError(f"the argument {argument!r} of {name} has no type")
    hints = typing.get_type_hints(function)
    result = None
    if "return" in hints:
        try:
            result = _of_hint(hints.pop("return"))
        except ValueError:  # a model need not produce the result, so its type may be one JSON lacks
            result = None
    properties = {argument: dict(_of_hint(hint)) for argument, hint in hints.items()}
    required = [
        argument
        for argument, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
    ]
    return properties, required, result


def _of_hint(hint: Any) -> dict[str, Any]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is None:
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return _of_values([member.value for member in hint], hint)
        if hint not in _TYPES:
            raise ValueError(f"JSON has no type for {hint!r}")
        return dict(_TYPES[hint])
    if origin in (typing.Union, types.UnionType):
        return _of_union(inner)
    if origin is typing.Literal:
        return _of_values(list(inner), hint)
    if origin is list:
        return {"type": "array", **({"items": _of_hint(inner[0])} if inner else {})}
    if origin is tuple:
        if len(inner) == 1 or ... in inner:
            raise ValueError(f"JSON has no type for {hint!r}; give list[...]")
        return {"type": "array", **({"prefixItems": list(map(_of_hint, inner))} if inner else {})}
    if origin is dict:
        more = {"additionalProperties": _of_hint(inner[1])} if len(inner) == 2 else {}
        return {"type": "object", **more}
    raise ValueError(f"JSON has no type for {hint!r}")


def _of_union(hints: Sequence[Any]) -> dict[str, Any]:
    found = [_of_hint(hint) for hint in hints if hint is not type(None)]
    if len(found) == 1:
        made = found[0]
    elif all(list(each) == ["type"] and isinstance(each["type"], str) for each in found):
        names = sorted({each["type"] for each in found})
        made = {"type": names[0] if len(names) == 1 else names}
    else:
        made = {"anyOf": found}
    return {**made, "nullable": True} if type(None) in hints else made


def _of_values(values: list[Any], hint: Any) -> dict[str, Any]:
    if not values or not all(type(value) in _SCALARS for value in values):
        raise ValueError(f"{hint!r} has values that JSON does not have")
    names = list(dict.fromkeys(_TYPES[type(value)]["type"] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _describe(schema: dict[str, Any], text: str) -> None:
    choices = _CHOICES.search(text)
    if choices:
        try:
            values = json.loads(choices[1])
            schema["enum"] = [v.strip() if isinstance(v, str) else v for v in values]
        except (ValueError, TypeError) as error:
            raise ValueError(f"choices={choices[1]!r}: must be a list in JSON") from error
        text = text[: choices.start()].strip()
    schema["description"] = text


def _read_docstring(text: str) -> tuple[str, dict[str, str], str | None]:
    """Split a docstring into the description, that of each argument, and that of the result."""
    before = re.split(r"\s*(?:Args:|Returns:|Raises:)", text, maxsplit=1)[0]
    lines = text.split("\n")
    sections: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines:
        section = _SECTION.fullmatch(line.rstrip())
        if section:
            current = sections.setdefault(section[1], [])
        else:
            current.append(line)
    returned = "\n".join(sections.get("Returns:", [])).strip()
    arguments = _arguments([line for line in sections.get("Args:", []) if line.strip()])
    return before.strip(), arguments, returned or None


def _arguments(lines: list[str]) -> dict[str, str]:
    """Return the descriptions by name; a line indented deeper than a name continues it."""
    found: dict[str, str] = {}
    name, indent = None, ""
    for line in lines:
        match = _ARGUMENT.fullmatch(line)
        deeper = name is not None and re.match(rf"{indent}[ \t]", line)
        if match and not deeper:
            indent, name = match[1], match[2]
            found[name] = match[3].strip()
        elif name is not None:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found
