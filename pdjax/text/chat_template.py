"""Chat templates: they turn a conversation into text in the format that a model was trained on.

A template is a Jinja program that comes with a model. It gets the same tags, filters, globals and
variables as in Hugging Face transformers 5, so that the text is the same.

A template may come with a downloaded file, so it runs in Jinja's sandbox and gets only plain data.
Bounds on its loops, its output and the size of products stop a template that loops or writes
without end. They do not bound what a single filter or a chain of concatenations allocates.
"""

import dataclasses
import inspect
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
import numpy as np

from pdjax.core.messages import one_line, shown
from pdjax.formats.json_file import failures_named
from pdjax.text.tool_schema import function_schema

Message = Mapping[str, Any]
"""One turn of a conversation: a "role", and "content" or other keys that the template reads."""

DEFAULT, WITH_TOOLS = "default", "tool_use"
"""Names of templates of a model that has several."""

MAX_ITERATIONS = 5_000_000
"""Most iterations of a template, over all its loops."""
MAX_CHARACTERS = 1 << 26
"""Most characters of a rendered conversation."""

MAX_COMPILED = 16
"""Most templates that stay compiled: a user may give any number of them."""

_OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message that may hold the model's reasoning; the first one that is there counts."""


class ChatTemplates:
    """The templates of a model, by name.

    Args:
      sources: Jinja source, or several by name, or None. Of several, "tool_use" renders
        conversations with tools, and "default" all others and those where "tool_use" is missing.
      special_tokens: texts of control tokens by the names that templates use, such as "bos_token".
      strftime_now: formats the date for templates that print one.
    """

    def __init__(
        self,
        sources: str | Mapping[str, str] | None,
        special_tokens: Mapping[str, str],
        strftime_now: Callable[[str], str],
    ) -> None:
        self.sources = sources if sources is None or isinstance(sources, str) else dict(sources)
        self._special_tokens = dict(special_tokens)
        self._environment = _Environment(strftime_now)
        self._compiled: dict[str, jinja2.Template] = {}

    def source(self, name: str | None = None, with_tools: bool = False) -> str:
        """Return the source of the template to use.

        Args:
          name: name of one of the model's templates, or the source of another; None takes the
            model's.
          with_tools: whether the conversation has tools.

        Raises:
          ValueError: there is no template.
        """
        named = self.sources if isinstance(self.sources, dict) else {}
        if name is not None:
            return named.get(name, name)
        if isinstance(self.sources, str):
            return self.sources
        for key in (WITH_TOOLS, DEFAULT) if with_tools else (DEFAULT,):
            if key in named:
                return named[key]
        if named:
            raise ValueError(
                f"chat_template: none of the model's is {DEFAULT!r}; give one of {sorted(named)}"
            )
        raise ValueError("chat: this model's tokenizer has no chat template; use generate instead")

    def render(
        self,
        messages: Iterable[Message],
        add_generation_prompt: bool = True,
        tools: Iterable[Any] | None = None,
        documents: Iterable[Any] | None = None,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render the text of a conversation.

        Args:
          messages: at least one, each with a role. Keys with the value None are left out.
          add_generation_prompt: whether the text ends with the head of an answer.
          tools: tools that the model may call, as JSON schemas or as functions with a docstring;
            None for no tools.
          documents: documents that the model may refer to; None for no documents.
          chat_template: name or source of a template; None takes the model's.
          variables: further variables that the template may read, such as `enable_thinking`; they
            override control tokens of the same name.

        Raises:
          ValueError: no template, an argument of another form, or the template refuses the
            messages.
        """
        listed = None if tools is None else _objects("tools", _with_schemas(tools))
        source = self.source(_checked_name(chat_template), listed is not None)
        known = {
            **self._special_tokens,
            **_checked_variables(variables),
            "messages": _with_reasoning(_messages(messages)),
            "tools": listed,
            "documents": None if documents is None else _objects("documents", documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            template = self._compiled.get(source)
            if template is None:
                if len(self._compiled) >= MAX_COMPILED:
                    self._compiled.clear()
                template = self._compiled[source] = self._environment.from_string(source)
            return self._environment.render(template, known)
        except Exception as error:  # a template is a program that may raise any exception
            raise ValueError(
                f"messages: the chat template refuses them ({one_line(error)})"
            ) from error


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The Jinja environment that chat templates expect."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self, strftime_now: Callable[[str], str]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self._rendering = threading.local()
        self.filters["tojson"] = _to_json
        self.filters["counted"] = self._count_iterations
        self.globals.update(
            raise_exception=_raise, strftime_now=strftime_now, dict=_Dict(), namespace=_Namespace
        )

    def render(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """Render a template.

        Raises:
          OverflowError: the template loops too often or writes too much.
        """
        self._rendering.iterations = 0
        pieces, length = [], 0
        for piece in template.generate(variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise OverflowError(f"more than {MAX_CHARACTERS} characters")
        return "".join(pieces)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a product or a power of bounded size.

        Raises:
          OverflowError: the result would be too large.
        """
        if isinstance(left, int) and isinstance(right, int):
            if operator == "**" and left.bit_length() * max(right, 0) > 4096:
                raise OverflowError(f"{left} ** {right} is too large")
        elif operator == "*":
            for values, times in ((left, right), (right, left)):
                sized = isinstance(values, str | list | tuple) and isinstance(times, int)
                if sized and len(values) * times > MAX_CHARACTERS:
                    raise OverflowError(f"{times} times {len(values)} is too large")
        return super().call_binop(context, operator, left, right)

    def _generate(self, source: jinja2.nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Compile a template so that its loops count their iterations."""
        for loop in list(source.find_all(jinja2.nodes.For)):
            loop.iter = jinja2.nodes.Filter(
                loop.iter, "counted", [], [], None, None, lineno=loop.lineno, environment=self
            )
        return super()._generate(source, *args, **kwargs)

    @jinja2.pass_context  # keeps Jinja from evaluating this filter while it compiles
    def _count_iterations(self, context: Any, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._rendering.iterations += 1
            if self._rendering.iterations > MAX_ITERATIONS:
                raise OverflowError(f"loops of more than {MAX_ITERATIONS} turns")
            yield value


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; the text is written as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parse the block as a call block, so that variables set inside stay inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    @staticmethod
    def _write(caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` in a template."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Make a dict of some keys with one value."""
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in a template; it refuses names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`, so that a namespace may hold one
        namespace, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(namespace, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace must not have the attribute {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write plain JSON; Jinja's own filter would escape characters for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _messages(messages: object) -> list[dict[str, Any]]:
    """Check the messages; return them as plain data without the keys that have the value None."""
    listed = _sequence("messages", messages)
    if not listed:
        raise ValueError(f"messages={messages!r}: must be a list of at least one message")
    plain = []
    for message in listed:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, bytes | bytearray):
            raise ValueError(f"messages: content={shown(content)}: must be text, not bytes")
        found = _plain(message)
        if not isinstance(found, dict):
            raise ValueError(
                f"messages: {shown(message)} must be a mapping with 'role' and 'content'"
            )
        known = {key: value for key, value in found.items() if value is not None}
        if "role" not in known or len(known) < 2:
            raise ValueError(
                f"messages: {shown(message)} must be a mapping with 'role' and 'content', or "
                "something else to say"
            )
        if not isinstance(known["role"], str):
            raise ValueError(f"messages: role={shown(known['role'])}: must be a string")
        plain.append(known)
    return plain


def _with_reasoning(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copy each message's reasoning to both names that templates read."""
    copied = []
    for message in messages:
        reasoning = next((message[key] for key in _REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        copied.append(message)
    return copied


def _objects(name: str, values: object) -> list[dict[str, Any]]:
    plain = [_plain(value) for value in _sequence(name, values)]
    for value in plain:
        if not isinstance(value, dict):
            raise ValueError(f"{name}: {shown(value)}: must be mappings")
    return plain


def _with_schemas(tools: object) -> list[Any]:
    listed = _sequence("tools", tools)
    for place, tool in enumerate(listed):
        if inspect.isfunction(tool) or inspect.ismethod(tool):
            with failures_named(f"tools: {tool.__name__} has no schema"):
                listed[place] = function_schema(tool)
    return listed


def _sequence(name: str, values: object) -> list[Any]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name}={shown(values)}: must be a list")
    return list(values)


def _checked_name(chat_template: object) -> str | None:
    if chat_template is not None and not isinstance(chat_template, str):
        raise ValueError(
            f"chat_template={shown(chat_template)}: must be None, or the name or source of one"
        )
    return chat_template


def _checked_variables(variables: object) -> dict[str, Any]:
    if variables is None:
        return {}
    if not isinstance(variables, Mapping) or not all(isinstance(key, str) for key in variables):
        raise ValueError(
            f"chat_template_kwargs={shown(variables)}: must be a mapping of names to values"
        )
    taken = sorted(set(variables) & set(_OWN_VARIABLES))
    if taken:
        raise ValueError(f"chat_template_kwargs: {taken[0]!r} has an argument of its own")
    return {key: _plain(value) for key, value in variables.items()}


def _plain(value: Any, depth: int = 0) -> Any:
    """Copy a value as plain data: a template must not reach the methods of other objects."""
    if depth > 200:
        raise ValueError("messages: nested more than 200 deep")
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):  # a subclass becomes its base type
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, depth + 1) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic):
        return _plain(value.item(), depth + 1)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name), depth + 1) for field in fields}
    if callable(getattr(value, "model_dump", None)):  # a message of an API client
        return _plain(value.model_dump(), depth + 1)
    return f"<{type(value).__name__}>"
