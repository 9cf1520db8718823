"""What the served model's answers may hold besides plain text, and what reads one of them."""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq

from pdjax.serving.parsers.calls import ARGUMENTS
from pdjax.serving.parsers.cursor import Parser
from pdjax.serving.parsers.forced import read_forced
from pdjax.serving.parsers.json_scanner import SPACE
from pdjax.serving.parsers.parts import (
    Arguments,
    CallBegins,
    CallEnds,
    NoCall,
    Part,
    Reasoning,
    Text,
)
from pdjax.serving.parsers.reasoning import ReasoningCount
from pdjax.serving.parsers.registry import AUTO, REASONING_PARSERS, TOOL_PARSERS, parser_of
from pdjax.serving.tool_choice import ToolChoice
from pdjax.text.tokenizer import Tokenizer

_PROMPT_END = 16
"""Tokens that a marker at the end of a prompt may take."""


class AnswerReader:
    """Reads the text of one choice, whole or as it comes.

    A call that turns out to be none is text again where the text is whole. Else it stays as far as
    it was told, without an end, and the rest is text: what was told can't be taken back.

    Args:
      parsers: each reads the text that the one before it leaves.
      count: of the reasoning's tokens; None where they can't be counted.
      first_alone: whether calls after the first whole one are left out.

    Attributes:
      reads: whether there are parsers; without them the answer is plain text.
      has_call: whether a call has come, whole.
    """

    def __init__(
        self, parsers: Seq[Parser], count: ReasoningCount | None = None, first_alone: bool = False
    ) -> None:
        self._parsers, self._count, self._first_alone = parsers, count, first_alone
        self.reads, self.has_call = bool(parsers), False
        self._reasons = self._answers = False  # whether there was reasoning, or anything else

    @property
    def reasoning_tokens(self) -> int | None:
        """Tokens of the reasoning so far; None where that can't be known, as of markers that were
        spelt with other tokens than their own."""
        count = self._count
        if count is None or (self._answers and count.is_open):
            return None
        return None if self._reasons and not count.tokens else count.tokens

    def push(self, text: str, token_ids: Iterable[int] = (), *, ended: bool = False) -> list[Part]:
        """Take further text and tokens; return what is certain now, of which no part is a `NoCall`.

        Args:
          text, token_ids: of the choice.
          ended: whether no more follows.
        """
        if not self.reads:
            return [Text(text)] if text else []
        parts = self._read(text, token_ids, ended)
        told = [Text(part.untold) if isinstance(part, NoCall) else part for part in parts]
        return [part for part in told if part != Text("")]

    def whole(self, text: str, token_ids: Iterable[int] = ()) -> list[Part]:
        """Take all text and tokens of a choice; return its parts, of which none is a `NoCall`."""
        parts: list[Part] = []
        for part in self._read(text, token_ids, ended=True):
            if isinstance(part, NoCall):
                if part.untold != part.text:
                    while not isinstance(parts.pop(), CallBegins):
                        pass
                parts.append(Text(part.text))
            else:
                parts.append(part)
        return parts

    def _read(self, text: str, token_ids: Iterable[int], ended: bool) -> list[Part]:
        if self._count is not None:
            self._count.push(token_ids)
        parts: list[Part] = [Text(text)] if text else []
        for parser in self._parsers:
            parts = list(_through(parser, parts))
            if ended:
                parts += parser.finish()
        return list(self._wanted(parts))

    def _wanted(self, parts: Iterable[Part]) -> Iterator[Part]:
        for part in parts:
            if self._first_alone and self.has_call:
                if isinstance(part, CallBegins | Arguments | CallEnds):
                    continue
                if isinstance(part, NoCall):  # nothing of it was told
                    part = NoCall(part.text, part.text)
            if isinstance(part, Reasoning):
                self._reasons = True
            else:
                self._answers = True
                self.has_call |= isinstance(part, CallEnds)
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
      arguments: the key under which the model writes a call's arguments.

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

    @property
    def arguments(self) -> str:
        return ARGUMENTS[0] if self._tools is None else self._tools.arguments

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

    def reader(
        self, prompt: Seq[int], choice: ToolChoice, first_alone: bool = False, guided: bool = False
    ) -> AnswerReader:
        """A reader of one choice.

        Args:
          prompt: token ids, which may end with the start of the reasoning.
          choice: the tools that may be called.
          first_alone: whether calls after the first whole one are left out.
          guided: whether the answer is held to a form, and so begins with that.
        """
        names = choice.names
        if choice.forced:
            return AnswerReader([Parser(lambda cursor: read_forced(cursor, names))])
        parsers, count = [], None
        reasoning, tools = self._reasoning, self._tools
        if reasoning is not None and self._tokenizer is not None:
            end = self._tokenizer.decode(prompt[-_PROMPT_END:], skip_special_tokens=False)
            is_open = not guided and reasoning.is_open(end)
            parsers.append(Parser(lambda cursor: reasoning.read(cursor, is_open)))
            opens, closes = map(self._tokenizer.token_id, (reasoning.opens, reasoning.closes))
            if opens is not None and closes is not None:
                count = ReasoningCount(opens, closes, is_open, self._is_space)
        if tools is not None and names:
            parsers.append(Parser(lambda cursor: tools.read(cursor, names)))
        return AnswerReader(parsers, count, first_alone)

    def _is_space(self, token: int) -> bool:
        assert self._tokenizer is not None, "there is text"
        return not self._tokenizer.decode([token], skip_special_tokens=False).strip(SPACE)
