"""Guide: a form that a generated text must have, as plain data.

Guided decoding masks the logits at each token, so that only tokens remain that lead to a text of
the form (Willard and Louf 2023).
"""

import enum
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pdjax.core.messages import shown

MAX_GUIDE_BYTES = 1 << 18
"""UTF-8 bytes of a guide's value, of all choices together."""
MAX_GRAMMAR_BYTES = 1 << 16
MAX_CHOICES = 4096
"""Those of a grammar, and choices: the time to compile them grows with the square."""


class GuideKind(enum.Enum):
    """How the form is written."""

    JSON_SCHEMA = "JSON schema"
    REGEX = "regular expression"
    CHOICES = "choices"
    GRAMMAR = "grammar"


@dataclass(frozen=True)
class Guide:
    """The form of a text; the constructors below make one of each kind.

    Attributes:
      kind: how the form is written.
      value: it; of choices the texts.
      name: what the caller calls it, for messages.

    Raises:
      ValueError: a value of another type, an empty one, one of more than 256 KiB (a grammar of more
        than 64 KiB), or more than 4,096 choices.
    """

    kind: GuideKind
    value: str | tuple[str, ...]
    name: str = field(default="guide", compare=False)

    def __post_init__(self) -> None:
        several = self.kind is GuideKind.CHOICES
        texts = self.value if isinstance(self.value, tuple) and several else (self.value,)
        if not texts or not all(isinstance(text, str) and text for text in texts):
            allowed = "at least one text, none empty" if several else "text that is not empty"
            raise ValueError(f"{self.name}={shown(self.value)}: a {self._kind} must be {allowed}")
        try:
            size = sum(len(str(text).encode()) for text in texts)
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise ValueError(f"{self.name}: must be text that UTF-8 can hold") from error
        most = MAX_GRAMMAR_BYTES if self.kind is GuideKind.GRAMMAR else MAX_GUIDE_BYTES
        if size > most:
            raise ValueError(f"{self.name}: a {self._kind} of {size} bytes; must be at most {most}")
        if several and len(texts) > MAX_CHOICES:
            raise ValueError(f"{self.name}: {len(texts)} choices; must be at most {MAX_CHOICES}")

    @property
    def _kind(self) -> str:
        return "list of choices" if self.kind is GuideKind.CHOICES else self.kind.value

    @classmethod
    def json_schema(cls, schema: str | bool | Mapping[str, Any], name: str = "guide") -> "Guide":
        """A JSON text that is valid under a JSON schema, given as JSON or as the value it stands
        for. True takes any JSON text."""
        if not isinstance(schema, str):
            try:
                schema = json.dumps(schema)
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"{name}: the schema is no JSON: {error}") from error
        return cls(GuideKind.JSON_SCHEMA, schema, name)

    @classmethod
    def json_object(cls, name: str = "guide") -> "Guide":
        """A JSON object, whatever its members are."""
        return cls.json_schema({"type": "object"}, name)

    @classmethod
    def regex(cls, pattern: str, name: str = "guide") -> "Guide":
        """A text that a regular expression matches from its beginning to its end."""
        return cls(GuideKind.REGEX, pattern, name)

    @classmethod
    def choices(cls, texts: Iterable[str], name: str = "guide") -> "Guide":
        """One of the texts."""
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise ValueError(f"{name}={shown(texts)}: choices must be a list of texts")
        return cls(GuideKind.CHOICES, tuple(texts), name)

    @classmethod
    def grammar(cls, text: str, name: str = "guide") -> "Guide":
        """A text that a context-free grammar derives, written in Lark's syntax or as GBNF."""
        return cls(GuideKind.GRAMMAR, text, name)
