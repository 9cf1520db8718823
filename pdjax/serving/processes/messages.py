"""What the engines' process and a front say to each other. Answers are named by numbers that their
front gives them."""

from typing import Any, NamedTuple

from pdjax.core.logprobs import PromptLogprobs, TokenLogprobs
from pdjax.core.outputs import RequestEvent
from pdjax.core.request import QueueFull
from pdjax.serving.backend import Ask, ServedModel
from pdjax.serving.front import Settings
from pdjax.session import Closed


class Setup(NamedTuple):
    """To a front, first: what it serves, and how.

    Attributes:
      number: of the front, for its log lines.
      model, settings: as in `Front`.
      certificate, key: paths for TLS; None is plain HTTP.
      tokenizer: a folder with the tokenizer's files; None where the model has no tokenizer.
      log_level: as of `logs.set_up`.
    """

    number: int
    model: ServedModel
    settings: Settings
    certificate: str | None
    key: str | None
    tokenizer: str | None
    log_level: str


class Ready(NamedTuple):
    """From a front: it takes connections."""


BEAT_S = 0.5
"""Most seconds between two `Alive` of a front."""


class Alive(NamedTuple):
    """From a front that is ready, at least each `BEAT_S`: its event loop goes round.

    Attributes:
      ended: of the connections that it was dealt, how many have ended.
    """

    ended: int


class End(NamedTuple):
    """To a front: drain, and end; a second one ends it at once."""


class Asked(NamedTuple):
    """From a front: a request."""

    number: int
    ask: Ask


class Accepted(NamedTuple):
    """To a front: a request is queued."""

    number: int


REFUSALS: tuple[type[Exception], ...] = (ValueError, QueueFull, Closed)
"""What `Backend.submit` raises for reasons that clients are told."""


class Refused(NamedTuple):
    """To a front: a request is not let in.

    Attributes:
      kind: name of a class of `REFUSALS`; any other is a fault of the server.
      message: of the error.
    """

    number: int
    kind: str
    message: str

    @classmethod
    def by(cls, number: int, error: Exception) -> "Refused":
        """What is told of an error. A fault's own message stays here."""
        for kind in REFUSALS:
            if isinstance(error, kind):
                return cls(number, kind.__name__, str(error))
        return cls(number, type(error).__name__, "the engines' process failed")

    def error(self) -> Exception:
        """What a front raises."""
        for kind in REFUSALS:
            if self.kind == kind.__name__:
                return kind(self.message)
        return RuntimeError(f"{self.message}: {self.kind}")


class StopFound(NamedTuple):
    """From a front: the first `tokens` tokens of a choice have completed a stop string."""

    number: int
    choice: int
    tokens: int
    stop: str


class Close(NamedTuple):
    """From a front: nobody reads an answer any more."""

    number: int


class Question(NamedTuple):
    """From a front: a method of the backend without arguments, such as `report`."""

    ticket: int
    method: str


class Told(NamedTuple):
    """To a front: the answer to a question; or why there is none."""

    ticket: int
    value: Any
    error: str | None


Logprobs = list[tuple[float, tuple[tuple[int, float], ...]]]
Ending = tuple[str, str | int | None, str | None, list[Any] | None]
"""Of a choice: its finish_reason, stop_reason and error; and with the last event of the request the
metrics of all choices."""
Piece = tuple[int, int, list[int], Logprobs | None, Ending | None]
"""What is new of a choice: the numbers of its answer and of itself, token ids, log-probabilities,
and its end. Plain tuples: the coordinator's thread pickles them, and a class each would take it
four times as long."""


class News(NamedTuple):
    """To a front: what a turn has brought."""

    pieces: list[Piece]


class PromptScored(NamedTuple):
    """To a front, before the first piece of an answer: its prompt's log-probabilities."""

    number: int
    logprobs: PromptLogprobs


def piece_of(number: int, event: RequestEvent) -> Piece:
    """An event without its text, for an answer of a front."""
    logprobs: Logprobs | None = None
    if event.logprobs is not None:
        logprobs = [(each.chosen, each.top) for each in event.logprobs]
    ending: Ending | None = None
    if event.finish_reason is not None:
        output = event.output
        metrics = None if output is None else [choice.metrics for choice in output.choices]
        ending = (event.finish_reason, event.stop_reason, event.error, metrics)
    return (number, event.choice, event.token_ids, logprobs, ending)


def logprobs_of(sent: Logprobs) -> list[TokenLogprobs]:
    """Log-probabilities as they were before `piece_of`."""
    return [TokenLogprobs(chosen, top) for chosen, top in sent]
