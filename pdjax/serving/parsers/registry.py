"""The parsers by name, and how the served model's are found."""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from pdjax.serving.parsers.calls import ToolSyntax
from pdjax.serving.parsers.hermes import HERMES
from pdjax.serving.parsers.llama3 import LLAMA3
from pdjax.serving.parsers.mistral import MISTRAL
from pdjax.serving.parsers.reasoning import ReasoningSyntax
from pdjax.serving.parsers.think import THINK
from pdjax.text.tokenizer import Tokenizer

AUTO, NONE = "auto", "none"

TOOL_PARSERS: dict[str, ToolSyntax] = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL}
"""Of calls of tools; the first one that fits a chat template is its."""

REASONING_PARSERS: dict[str, ReasoningSyntax] = {"think": THINK}
"""Of reasoning; likewise."""


class _Syntax(Protocol):
    @property
    def fits(self) -> Callable[[str], bool]: ...


SyntaxT = TypeVar("SyntaxT", bound=_Syntax)


def parser_of(
    field: str, name: str, known: Mapping[str, SyntaxT], tokenizer: Tokenizer | None
) -> tuple[str, SyntaxT | None]:
    """The parser of a name, and its own name: of "auto" the one that fits the model's chat
    templates, or none.

    Raises:
      ValueError: there is no such parser, or the model has no tokenizer and so no text.
    """
    if name not in (AUTO, NONE, *known):
        allowed = ", ".join((AUTO, NONE, *known))
        raise ValueError(f"{field}={name!r}: must be one of {allowed}")
    if name in known:
        if tokenizer is None:
            raise ValueError(f"{field}={name!r}: the model has no tokenizer, so there is no text")
        return name, known[name]
    if name == AUTO and tokenizer is not None:
        source = tokenizer.chat_template or ""
        text = source if isinstance(source, str) else "\n".join(source.values())
        for each, syntax in known.items():
            if syntax.fits(text):
                return each, syntax
    return NONE, None
