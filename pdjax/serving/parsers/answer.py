"""What the served model's answers may hold besides plain text, and what reads one of them."""

from collections.abc import Iterable, Iterator, Set
from collections.abc import Sequence as Seq

from pdjax.serving.parsers.cursor import Parser
from pdjax.serving.parsers.json_scanner import SPACE
from pdjax.serving.parsers.parts import Arguments, CallBegins, CallEnds, NoCall, Part, Text
from pdjax.serving.parsers.reasoning import ReasoningCount
from pdjax.serving.parsers.registry import AUTO, REASONING_PARSERS, TOOL_PARSERS, parser_of
from pdjax.text.tokenizer import Tokenizer

_PROMPT_END = 16
"""Tokens that a marker at the end of a prompt may take."""


class AnswerReader:
    """Reads the text of one choice.

    Args:
      parsers: each reads the text that the one before it leaves.
      first_alone: whether calls after the first whole one are left out.
    """

    def __init__(self, parsers: Seq[Parser], first_alone: bool = False) -> None:
        self._parsers, self._first_alone = parsers, first_alone
        self._has_call = False

    def push(self, text: str) -> list[Part]:
        """Take further text; return what is certain now."""
        parts: list[Part] = [Text(text)] if text else []
        for parser in self._parsers:
            parts = list(_through(parser, parts))
        return [*self._wanted(parts)]

    def finish(self) -> list[Part]:
        """End the text; return what was held back."""
        parts: list[Part] = []
        for parser in self._parsers:
            parts = [*_through(parser, parts), *parser.finish()]
        return [*self._wanted(parts)]

    def _wanted(self, parts: Iterable[Part]) -> Iterator[Part]:
        for part in parts:
            if self._first_alone and self._has_call:
                if isinstance(part, CallBegins | Arguments | CallEnds):
                    continue
                if isinstance(part, NoCall):  # nothing of it was told
                    part = NoCall(part.text, part.text)
            self._has_call |= isinstance(part, CallEnds)
            yield part


def _through(parser: Parser, parts: Iterable[Part]) -> Iterator[Part]:
    for part in parts:
        if isinstance(part, Text):
            yield from parser.push(part.text)
        else:
            yield part


class AnswerSyntax:
    """How the served model writes calls of tools and its reasoning.

    Args:
      tokenizer: of the model.
      tool_parser, reasoning_parser: names of parsers; "auto" goes by the chat template.

    Attributes:
      tool_parser, reasoning_parser: names of those that were found, or "none".

    Raises:
      ValueError: there is no such parser.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, tool_parser: str = AUTO, reasoning_parser: str = AUTO
    ) -> None:
        self._tokenizer = tokenizer
        self.tool_parser, self._tools = parser_of(
            "tool_call_parser", tool_parser, TOOL_PARSERS, tokenizer
        )
        self.reasoning_parser, self._reasoning = parser_of(
            "reasoning_parser", reasoning_parser, REASONING_PARSERS, tokenizer
        )

    def shown_tokens(self, has_tools: bool) -> tuple[int, ...]:
        """The control tokens that parsers have to see in the text of an answer.

        Args:
          has_tools: whether tools are offered.
        """
        texts: tuple[str, ...] = ()
        if self._tools is not None and has_tools:
            texts += self._tools.markers
        if self._reasoning is not None:
            texts += (self._reasoning.opens, self._reasoning.closes)
        if self._tokenizer is None or not texts:
            return ()
        ids = {self._tokenizer.token_id(text) for text in texts}
        return tuple(sorted(token for token in self._tokenizer.special_token_ids if token in ids))

    def reads(self, has_tools: bool) -> bool:
        """Whether answers are read at all, or are plain text."""
        return self._reasoning is not None or (self._tools is not None and has_tools)

    def reader(
        self, prompt: Seq[int], names: Set[str] = frozenset(), first_alone: bool = False
    ) -> AnswerReader:
        """A reader of one choice.

        Args:
          prompt: token ids, which may end with the start of the reasoning.
          names: of the tools that are offered.
          first_alone: whether calls after the first whole one are left out.
        """
        parsers = []
        reasoning, tools = self._reasoning, self._tools
        if reasoning is not None:
            is_open = self._is_open(prompt)
            parsers.append(Parser(lambda cursor: reasoning.read(cursor, is_open)))
        if tools is not None and names:
            parsers.append(Parser(lambda cursor: tools.read(cursor, names)))
        return AnswerReader(parsers, first_alone)

    def reasoning_count(self, prompt: Seq[int]) -> ReasoningCount | None:
        """What counts the reasoning of one choice; None where the markers are no tokens.

        Args:
          prompt: token ids, which may end with the start of the reasoning.
        """
        reasoning, tokenizer = self._reasoning, self._tokenizer
        if reasoning is None or tokenizer is None:
            return None
        opens, closes = map(tokenizer.token_id, (reasoning.opens, reasoning.closes))
        if opens is None or closes is None:
            return None

        def is_space(token: int) -> bool:
            return not tokenizer.decode([token], skip_special_tokens=False).strip(SPACE)

        return ReasoningCount(opens, closes, self._is_open(prompt), is_space)

    def _is_open(self, prompt: Seq[int]) -> bool:
        """Whether the prompt has begun the reasoning."""
        if self._reasoning is None or self._tokenizer is None:
            return False
        end = self._tokenizer.decode(prompt[-_PROMPT_END:], skip_special_tokens=False)
        return self._reasoning.is_open(end)
