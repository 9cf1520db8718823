"""What a session keeps of a request, which thread the news of it wakes, and what is asked for."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pdjax.core.logprobs import PromptLogprobs
from pdjax.core.outputs import RequestEvent, RequestOutput
from pdjax.core.request import Request
from pdjax.host.sequences.sequence import Sequence


class Listener:
    """A thread that waits for requests of its own, and what has come for it.

    Attributes:
      finished: entries that have their answer, in the order in which they got it.
      wants_turns: whether every turn wakes it, not only news of its requests.
    """

    def __init__(self, *, wants_turns: bool = False) -> None:
        self.finished: deque[Entry] = deque()
        self.wants_turns = wants_turns
        self.event = threading.Event()


@dataclass(eq=False)
class Entry:
    """A request in the book.

    Attributes:
      request, prompt: what was asked; the prompt where it was text.
      sequences: its choices.
      listener: the thread that its news wakes.
      on_event: called with every event of the request, within a turn; None hears nothing.
      callback: what messages call `on_event`.
      whole: whether a choice has one event, at its end, instead of one a turn.
      events: what `on_event` has put there for a stream; None where there is no stream.
      is_taken: whether `Session.take` fetches the answer, where there is no listener.
      thread: the thread that submitted it, as `threading.get_ident` names it.
      answer: once it has ended.
      closed: whether all of its events have been told, and it has left the book.
    """

    request: Request
    prompt: str | None
    sequences: list[Sequence]
    listener: Listener | None = None
    on_event: Callable[[RequestEvent], None] | None = None
    callback: str = "on_event"
    whole: bool = False
    events: deque[RequestEvent] | None = None
    is_taken: bool = True
    thread: int = field(default_factory=threading.get_ident)
    answer: RequestOutput | None = None
    closed: bool = False
    _told: dict[int, int] = field(default_factory=dict)  # tokens, by choice; an ended choice has -1
    _held: set[int] = field(default_factory=set)  # choices of which nothing was told yet

    @property
    def ended(self) -> bool:
        """Whether every choice has come to its end."""
        return all(sequence.done for sequence in self.sequences)

    @property
    def prompt_logprobs(self) -> PromptLogprobs | None:
        """Those of the prompt; None where they were not asked for or a part is missing."""
        scores = self.sequences[0].prompt_scores
        return None if scores is None else scores.report(self.request.prompt_token_ids)

    @property
    def _waits_for_prompt(self) -> bool:
        """Whether nothing is told yet: the first event of each choice brings log-probabilities of
        the prompt, and they are not complete."""
        first = self.sequences[0]
        scores = first.prompt_scores
        return scores is not None and not scores.complete and not first.done

    def events_of(self, sequence: Sequence) -> Iterator[RequestEvent]:
        """What is new of a choice since the last time, and of those that waited for the prompt:
        they may have ended meanwhile, and be heard of no more."""
        due = [sequence]
        if self._held and not self._waits_for_prompt:
            due += [self.sequences[choice] for choice in sorted(self._held - {sequence.choice})]
            self._held.clear()
        return filter(None, map(self.event_of, due))

    def event_of(self, sequence: Sequence) -> RequestEvent | None:
        """What is new of a choice since the last time; None where nothing is."""
        choice, done = sequence.choice, sequence.done
        told = self._told.get(choice, 0)
        if self._waits_for_prompt:
            self._held.add(choice)
            return None
        if told < 0 or (self.whole and not done):
            return None
        tokens = sequence.output[told:]
        text = sequence.text.take() if sequence.text is not None else ""
        if not (tokens or text or done):
            return None
        prompt_logprobs = None if choice in self._told else self.prompt_logprobs
        self._told[choice] = -1 if done else told + len(tokens)
        wants_logprobs = sequence.request.params.logprobs is not None
        return RequestEvent(
            text=text,
            token_ids=tokens,
            finish_reason=sequence.finish_reason if done else None,
            choice=choice,
            logprobs=sequence.logprobs[told : told + len(tokens)] if wants_logprobs else None,
            stop_reason=sequence.stop_reason if done else None,
            error=sequence.error if done else None,
            prompt_logprobs=prompt_logprobs,
            request_id=sequence.request.id,
        )

    def is_hit_by(self, error: BaseException) -> bool:
        """Whether what its callback has raised in this thread is meant for this thread: it is no
        plain error, and the thread has submitted the request or is where Python raises Ctrl-C."""
        if isinstance(error, Exception):
            return False
        main = threading.main_thread().ident
        here = threading.get_ident()
        return here == self.thread or (isinstance(error, KeyboardInterrupt) and here == main)


class Stop(NamedTuple):
    """A choice whose first `tokens` tokens have completed a stop string, as whoever makes its text
    has found."""

    request_id: str
    choice: int
    tokens: int
    stop: str


class Call(NamedTuple):
    """What is to be called between two turns, and what comes of it."""

    function: Callable[[], Any]
    outcome: Future[Any]

    def carry_out(self) -> None:
        """Call it, unless nobody waits for it any more."""
        if self.outcome.set_running_or_notify_cancel():
            try:
                self.outcome.set_result(self.function())
            except BaseException as error:
                self.outcome.set_exception(error)
                if not isinstance(error, Exception):
                    raise


@dataclass
class Inbox:
    """What has been asked for and not been carried out. `append` and `popleft` of a deque need no
    lock, and may come in the middle of one another, as from a finaliser."""

    arrivals: deque[Entry] = field(default_factory=deque)
    stops: deque[Stop] = field(default_factory=deque)
    aborts: deque[str] = field(default_factory=deque)
    calls: deque[Call] = field(default_factory=deque)

    def __bool__(self) -> bool:
        return bool(self.arrivals or self.stops or self.aborts or self.calls)


def text_of_first_choice(on_text: Callable[[str], None]) -> Callable[[RequestEvent], None]:
    """An `on_event` that calls `on_text` with further text of the first choice."""

    def hear(event: RequestEvent) -> None:
        if event.choice == 0 and event.text:
            on_text(event.text)

    return hear
