"""What bounds the choice of tokens in the bodies of requests: OpenAI's `response_format` and
`logit_bias`, vLLM's `structured_outputs`, and the four fields that vLLM had before."""

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from pdjax.core.guide import Guide
from pdjax.serving.errors import bad_value, not_supported, of_submit

FORMATS = ("text", "json_object", "json_schema")
"""Types of a `response_format`."""

_MAKERS: dict[str, Callable[[Any, str], Guide]] = {
    "json": Guide.json_schema,
    "regex": Guide.regex,
    "choice": Guide.choices,
    "grammar": Guide.grammar,
}
"""What makes a guide of a field's value and name."""


class GuidedRequest(BaseModel):
    """The fields of all requests that bound the choice of tokens; None is "not given"."""

    model_config = ConfigDict(extra="allow", strict=True)

    logit_bias: dict[str, Any] | None = None
    min_tokens: int | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[Any] | None = None
    guided_grammar: str | None = None

    def bounds(self) -> dict[str, Any]:
        """The fields as those of SamplingParams; what is not given is None.

        Raises:
          ApiError: a 400: a bias of no token, a form that is none, or several forms.
        """
        try:
            guides = list(self.guides())
        except ValueError as error:
            raise of_submit(error) from error
        if len(guides) > 1:
            names = " and ".join(guide.name for guide in guides)
            raise of_submit(ValueError(f"{names}: each asks for a form; give one of them"))
        return {
            "logit_bias": None if self.logit_bias is None else _by_id(self.logit_bias),
            "min_tokens": self.min_tokens,
            "guide": guides[0] if guides else None,
        }

    def guides(self) -> Iterator[Guide]:
        """All forms that are asked for, each named by its field.

        Raises:
          ValueError: one that is none.
          ApiError: a 400 for one that is not supported.
        """
        for kind, make in _MAKERS.items():
            value = getattr(self, f"guided_{kind}")
            if value is not None:
                yield make(value, f"guided_{kind}")
        for kind, value in (self.structured_outputs or {}).items():
            name = f"structured_outputs.{kind}"
            if value is None or value is False:
                continue
            if kind == "json_object":
                yield Guide.json_object(name)
            elif kind in _MAKERS:
                yield _MAKERS[kind](value, name)
            else:
                raise not_supported(name)


def of_format(name: str, asked: dict[str, Any] | None, schema_in: str | None) -> Iterator[Guide]:
    """The form of OpenAI's `response_format`, or of `text.format` of responses.

    Args:
      name: of the field.
      asked: its value.
      schema_in: the member that holds the schema; None where it stands beside the type.

    Raises:
      ApiError: a 400.
    """
    if asked is None:
        return
    kind = asked.get("type")
    if kind not in FORMATS:
        raise bad_value(f"{name}.type", kind, f"must be one of {', '.join(FORMATS)}")
    if kind == "json_object":
        yield Guide.json_object(name)
    elif kind == "json_schema":
        holder, where = asked, name
        if schema_in is not None:
            holder, where = asked.get(schema_in) or {}, f"{name}.{schema_in}"
        schema = holder.get("schema") if isinstance(holder, dict) else None
        if not isinstance(schema, dict):
            raise bad_value(f"{where}.schema", schema, "must be a JSON schema")
        yield Guide.json_schema(schema, name)


def _by_id(biases: dict[str, Any]) -> dict[int, Any]:
    """Biases by token ids.

    Raises:
      ApiError: a 400: a key is no token id.
    """
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise bad_value("logit_bias", key, "keys must be token ids")
    return {int(key): bias for key, bias in biases.items()}
