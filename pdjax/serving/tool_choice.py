"""Which tools a model may call in a request, and of which it must call one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pdjax.core.guide import Guide
from pdjax.serving.errors import bad_value, not_supported

Tool = Mapping[str, Any]


@dataclass(frozen=True)
class ToolChoice:
    """The tools of a request, in the form of chats.

    Attributes:
      tools: those that the template is given; None for none.
      forced: those of which one must be called; empty where none must.
    """

    tools: list[dict[str, Any]] | None = None
    forced: tuple[Tool, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """The names of the tools that may be called."""
        functions = map(_function, self.forced or self.tools or ())
        names = [function.get("name") for function in functions]
        return frozenset(name for name in names if isinstance(name, str))

    def guide(self, key: str) -> Guide | None:
        """The form of a call that is forced: an object with a name, and arguments that are valid
        under that tool's schema. None where none is forced.

        Args:
          key: of the arguments.

        Raises:
          ApiError: a 400: a tool without a name.
        """
        if not self.forced:
            return None
        calls = [_call_schema(tool, key, number) for number, tool in enumerate(self.forced)]
        return Guide.json_schema({"anyOf": calls}, "tools")


def tool_choice_of(tools: Iterable[dict[str, Any]] | None, choice: object) -> ToolChoice:
    """What `tool_choice` makes of `tools`.

    Args:
      tools: in the form of chats.
      choice: None, "auto", "none", "required", or a function by its name, as chats or as responses
        write it.

    Raises:
      ApiError: a 400: it is none of these, or no such tool is offered.
    """
    offered = list(tools or ()) or None
    if choice in (None, "auto"):
        return ToolChoice(offered)
    if choice == "none":
        return ToolChoice()
    if choice == "required":
        forced = offered or []
    elif isinstance(choice, dict) and choice.get("type") == "function":
        name = _function(choice).get("name")
        forced = [tool for tool in offered or () if _function(tool).get("name") == name]
    elif isinstance(choice, dict):
        raise not_supported("tool_choice.type", "tool_choice.type: must be function")
    else:
        allowed = "must be none, auto, required, or a function by its name"
        raise bad_value("tool_choice", choice, allowed)
    if not forced:
        raise bad_value("tool_choice", choice, "there is no such tool among `tools`")
    return ToolChoice(offered, tuple(forced))


def _function(tool: Tool) -> Tool:
    """The function of a tool, which some templates take by itself."""
    function = tool.get("function", tool)
    return function if isinstance(function, dict) else {}


def _call_schema(tool: Tool, key: str, number: int) -> dict[str, Any]:
    """The schema of a call, as the one of this number."""
    function = _function(tool)
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name.isprintable() or not name:
        raise bad_value("tools", tool, "must be functions with a name")
    schema: dict[str, Any] = {"type": "object"}
    if isinstance(parameters, dict) and parameters:
        try:
            schema |= _moved(parameters, f"#/anyOf/{number}/properties/{key}")
        except RecursionError as error:
            raise bad_value("tools", name, "has parameters that are nested too deep") from error
    return {
        "type": "object",
        "properties": {"name": {"const": name}, key: schema},
        "required": ["name", key],
        "additionalProperties": False,
    }


def _moved(schema: Any, root: str) -> Any:
    """A schema that stands at `root` of another one: its references to itself lead there."""
    if isinstance(schema, list):
        return [_moved(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(each, root) for name, each in schema.items()}
    place = schema.get("$ref")
    if isinstance(place, str) and (place == "#" or place.startswith("#/")):
        moved["$ref"] = root + place[1:]
    return moved
