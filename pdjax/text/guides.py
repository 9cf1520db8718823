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
from typing import Any, TypeVar

import numpy as np
import tokenizers

from pdjax.core.guide import MAX_CHOICES, Guide, GuideKind
from pdjax.core.messages import one_line
from pdjax.text.tokenizer import Tokenizer

ResultT = TypeVar("ResultT")

_MOST_KEPT = 64
"""Compiled guides that are kept: clients ask for the same ones again and again."""

_LIMITS = {
    "max_lexer_states": 50_000,
    "max_items_in_row": 2 * MAX_CHOICES,
    "verbose_errors": False,
}
"""Besides those that the library has itself: a state takes one or two kilobytes, and each choice is
an item."""

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
      matcher: llguidance's, at the beginning of the text; changed by this alone.
      vocab_size: V.
      end: token of the matcher that stands for the end.
      name: of the guide, for messages.

    Attributes:
      accepts: whether the text may end here.
      complete: whether it must: nothing can follow.
    """

    def __init__(self, matcher: Any, vocab_size: int, end: int, name: str) -> None:
        self._matcher, self._vocab_size, self._end, self._name = matcher, vocab_size, end, name

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


class GuideCompiler:
    """Makes guides over one vocabulary; safe from any thread.

    llguidance's tokenizer is made with the first guide: for a large vocabulary that takes half a
    second, and some hundred MiB.

    Args:
      tokenizer: of the model.
      vocab_size: V, of the model; its tokenizer may know fewer tokens, or more.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock, self._compiling = threading.Lock(), threading.Lock()
        self._library: Any = None
        self._vocabulary: Any = None
        self._end = -1
        self._kept: OrderedDict[Guide, Any] = OrderedDict()

    def check(self, guide: Guide) -> None:
        """Compile a guide, which `start` then finds. All texts of a guide share the states that
        their paths have led to, and their bound; one that has come to it is compiled anew.

        Raises:
          ValueError: llguidance is not installed, or refuses the tokenizer or the guide; with its
            reason.
        """
        compiled = self._compiled(guide)
        first = compiled.deep_copy()
        first.compute_bitmask()
        if first.is_error():
            with self._lock:
                if self._kept.get(guide) is compiled:
                    del self._kept[guide]
            self._compiled(guide)

    def start(self, guide: Guide) -> TokenGuide:
        """A guide at the beginning of a text.

        Raises:
          ValueError: as `check`.
        """
        matcher = self._compiled(guide).deep_copy()
        return TokenGuide(matcher, self._vocab_size, self._end, guide.name)

    def _compiled(self, guide: Guide) -> Any:
        with self._lock:
            if self._library is None:
                self._open(guide.name)
            if (kept := self._kept.get(guide)) is not None:
                self._kept.move_to_end(guide)
                return kept
        with self._compiling:
            compiled = self._compile(guide)
        with self._lock:
            self._kept[guide] = compiled
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return compiled

    def _open(self, name: str) -> None:
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

    def _compile(self, guide: Guide) -> Any:
        library = self._library

        def compile_it() -> Any:
            grammar = _grammar(library, guide)
            limits = library.LLParserLimits(**_LIMITS)
            matcher = library.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
            if not matcher.is_error():
                matcher.compute_bitmask()  # copies find what this has worked out
            return matcher

        try:
            matcher = _with_deep_stack(compile_it)
        except ValueError as error:
            raise _refused(guide, str(error)) from error
        if matcher.is_error():
            raise _refused(guide, matcher.get_error())
        return matcher


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
