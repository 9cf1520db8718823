"""Guides over a vocabulary: which tokens may follow, by the library llguidance.

Its grammars run over bytes, and a token may follow where its bytes do, wherever they begin and end
in the grammar (as in Koo et al. 2024). It is an optional package, imported when a guide is first
asked for.
"""

import importlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import tokenizers

from pdjax.core.guide import MAX_CHOICES, Guide, GuideKind
from pdjax.core.messages import one_line
from pdjax.text.tokenizer import Tokenizer

ResultT = TypeVar("ResultT")

_MOST_KEPT = 64
"""Guides that are kept ready: clients ask for the same ones again and again."""

_LIMITS = {
    "max_lexer_states": 16_384,
    "max_items_in_row": 2 * MAX_CHOICES,
    "verbose_errors": False,
}
"""Besides those that the library has itself. Each answer has states of its own, of one or two
kilobytes: a thousand tokens of most forms need fewer than 300, of 4,096 choices 1,000. Each choice
is an item."""

_STACK_SIZE = threading.Lock()
"""Held while threads begin with a stack of another size, which is the process's to set."""

_STACK = 256 << 20
"""Bytes of stack for a compilation: llguidance goes down into rules that name one another, as deep
as a guide of the largest size may make them. What is not used takes no memory."""

_MOST_GBNF = 8 << 10
"""Bytes of a grammar in GBNF: its conversion to Lark takes a quarter of a second for so many."""

_JSON = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}
"""Of JSON: room for an indentation, and a bound for models that would write blanks for ever."""

_END = "<|end of a guided text|>"
"""Stands for the end of a text in llguidance's vocabulary; no model has it. Which tokens end an
answer is the caller's to know."""


class TokenGuide:
    """How far a text has come in its form.

    Args:
      compile: makes llguidance's matcher, at the beginning of the text, when it is first needed.
      vocab_size: V.
      end: token of the matcher that stands for the end.
      name: of the guide, for messages.

    Attributes:
      accepts: whether the text may end here.
      complete: whether it must: nothing can follow.
    """

    def __init__(self, compile: Callable[[], Any], vocab_size: int, end: int, name: str) -> None:
        self._compile, self._vocab_size, self._end, self._name = compile, vocab_size, end, name

    @cached_property
    def _matcher(self) -> Any:
        return self._compile()

    @property
    def accepts(self) -> bool:
        return self._matcher.is_accepting()

    @property
    def complete(self) -> bool:
        return self._matcher.is_stopped()

    def mask(self) -> np.ndarray:
        """u32[ceil(V / 32)], the tokens that may follow, a fresh array.

        Raises:
          ValueError: there is none, or the form has become too complex to follow.
        """
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        words = -(-self._vocab_size // 32)
        bits = np.zeros(max(words, len(found)), np.uint32)
        bits[: len(found)] = found
        bits[self._end // 32] &= ~np.uint32(1 << self._end % 32)
        return bits[:words]

    def push(self, token_id: int) -> None:
        """Add a token that the mask allowed.

        Raises:
          ValueError: likewise.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        reason = _reason(self._matcher.get_error())
        raise ValueError(f"{self._name}: can't be followed any further: {reason}")


@dataclass(eq=False)
class _Form:
    """A guide that can be compiled: as llguidance takes it, and a matcher that no text has yet."""

    grammar: str
    unused: Any = None


class GuideCompiler:
    """Makes guides over one vocabulary; safe from any thread.

    Each text has a matcher of its own, which is compiled for it: copies of one would share their
    states and the bound of those, so that one text could wear it out for the others, and they would
    wait for one another. llguidance's tokenizer is made with the first guide: for a large
    vocabulary that takes half a second, and some hundred MiB.

    Args:
      tokenizer: of the model.
      vocab_size: V, of the model; its tokenizer may know fewer tokens, or more.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._library: Any = None
        self._vocabulary: Any = None
        self._end = -1
        self._kept: OrderedDict[Guide, _Form] = OrderedDict()

    def check(self, guide: Guide) -> None:
        """Compile a guide, for the next `start`.

        Raises:
          ValueError: llguidance is not installed, or refuses the tokenizer or the guide; with its
            reason.
        """
        form, matcher = self._matcher(guide)
        form.unused = matcher

    def start(self, guide: Guide) -> TokenGuide:
        """A guide at the beginning of a text. It is compiled when it is first asked, unless `check`
        has left a matcher; it raises then what `check` does.

        Raises:
          ValueError: llguidance is not installed, or refuses the tokenizer.
        """
        with self._lock:
            self._open(guide.name)
        return TokenGuide(lambda: self._matcher(guide)[1], self._vocab_size, self._end, guide.name)

    def _matcher(self, guide: Guide) -> tuple[_Form, Any]:
        """One that no text has, and the form that it follows."""
        with self._lock:
            self._open(guide.name)
            form = self._kept.get(guide)
            if form is not None:
                self._kept.move_to_end(guide)
                matcher, form.unused = form.unused, None
                if matcher is not None:
                    return form, matcher
        form, matcher = self._compile(guide, form)
        with self._lock:
            self._kept[guide] = form
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return form, matcher

    def _open(self, name: str) -> None:
        if self._library is not None:
            return
        try:
            library = importlib.import_module("llguidance")
        except ImportError as error:
            raise ValueError(
                f"{name}: needs the package llguidance; install it, as with pdjax[guided]"
            ) from error
        vocabulary = tokenizers.Tokenizer.from_str(self._tokenizer.to_json())
        vocabulary.add_special_tokens([tokenizers.AddedToken(_END, special=True)])
        self._end = vocabulary.get_vocab()[_END]
        try:
            self._vocabulary = library.LLTokenizer(vocabulary.to_str(), eos_token=[self._end])
        except ValueError as error:
            raise ValueError(
                f"{name}: llguidance does not take the model's tokenizer: {_reason(str(error))}"
            ) from error
        self._library = library

    def _compile(self, guide: Guide, form: _Form | None) -> tuple[_Form, Any]:
        """A matcher, of a form that is known, or of none; the time of most is a millisecond."""
        library = self._library

        def compile_it() -> tuple[_Form, Any]:
            known = form or _Form(_grammar(library, guide))
            limits = library.LLParserLimits(**_LIMITS)
            matcher = library.LLMatcher(self._vocabulary, known.grammar, log_level=0, limits=limits)
            if not matcher.is_error():
                matcher.compute_bitmask()  # whether there is any token to begin with
            return known, matcher

        try:
            known, matcher = _with_deep_stack(compile_it)
        except ValueError as error:
            raise _refused(guide, str(error)) from error
        if matcher.is_error():
            raise _refused(guide, matcher.get_error())
        return known, matcher


def _grammar(library: Any, guide: Guide) -> str:
    """A guide as llguidance takes it."""
    match guide.kind:
        case GuideKind.JSON_SCHEMA:
            return library.LLMatcher.grammar_from_json_schema(guide.value, defaults=_JSON)
        case GuideKind.REGEX:
            return library.grammar_from("regex", guide.value)
        case GuideKind.CHOICES:
            return library.grammar_from("choice", json.dumps(guide.value))
        case GuideKind.GRAMMAR if "::=" in guide.value:
            if len(guide.value) > _MOST_GBNF:
                raise ValueError(f"{len(guide.value)} characters of GBNF, at most {_MOST_GBNF}")
            return library.grammar_from("gbnf", guide.value)
        case GuideKind.GRAMMAR:
            return library.grammar_from("lark", guide.value)


def _with_deep_stack(call: Callable[[], ResultT]) -> ResultT:
    """Call it in a thread of its own, and wait for that."""
    outcome: Future[ResultT] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    with _STACK_SIZE:
        before = threading.stack_size(_STACK)
        try:
            threading.Thread(target=run, name="pdjax guide").start()
        finally:
            threading.stack_size(before)
    return outcome.result()


def _refused(guide: Guide, reason: str) -> ValueError:
    return ValueError(f"{guide.name}: the {guide.kind.value} can't be followed: {_reason(reason)}")


def _reason(text: str) -> str:
    """What llguidance says, in one line."""
    if text.startswith("NoExtension"):
        return "no token of the vocabulary goes on with the text"
    return one_line(ValueError(text))
