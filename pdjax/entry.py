"""What a session keeps of a request, and who is woken by its news."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pdjax.core.outputs import RequestOutput
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
      listener: whom its news wakes; None where `take` fetches the answer.
      on_text: called with each further piece of the first choice's text, within a turn.
      pieces: further tokens and text of the first choice, for a stream; None keeps none.
      thread: the thread that submitted it, as `threading.get_ident` names it.
      answer: once it has ended.
    """

    request: Request
    prompt: str | None
    sequences: list[Sequence]
    listener: Listener | None = None
    on_text: Callable[[str], None] | None = None
    pieces: deque[tuple[list[int], str]] | None = None
    thread: int = field(default_factory=threading.get_ident)
    answer: RequestOutput | None = None

    @property
    def ended(self) -> bool:
        """Whether every choice has come to its end."""
        return all(sequence.done for sequence in self.sequences)

    def is_hit_by(self, error: BaseException) -> bool:
        """Whether what its callback has raised in this thread is meant for this thread: it is no
        plain error, and the thread has submitted the request or is where Python raises Ctrl-C."""
        if isinstance(error, Exception):
            return False
        main = threading.main_thread().ident
        here = threading.get_ident()
        return here == self.thread or (isinstance(error, KeyboardInterrupt) and here == main)


@dataclass
class Inbox:
    """What has been asked for and not been carried out. `append` and `popleft` of a deque need no
    lock, and may come in the middle of one another, as from a finaliser."""

    arrivals: deque[Entry] = field(default_factory=deque)
    aborts: deque[str] = field(default_factory=deque)

    def __bool__(self) -> bool:
        return bool(self.arrivals or self.aborts)
