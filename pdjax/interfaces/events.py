"""What the coordinator is told: events, and where they come from."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pdjax.core.ids import EngineId
from pdjax.interfaces.tickets import Ticket


@dataclass(frozen=True)
class StepDone:
    """The oldest step in flight of an engine has come back."""

    engine: EngineId


@dataclass(frozen=True)
class JobRead:
    """The source's pages of a transfer job have been read."""

    job_id: int


@dataclass(frozen=True)
class JobArrived:
    """A transfer job has arrived, or has failed."""

    job_id: int


@dataclass(frozen=True)
class JobWritten:
    """The pages of a transfer job have been written, or writing them has failed."""

    job_id: int


@dataclass(frozen=True)
class TimerDue:
    """A moment that was asked for has come."""

    key: Hashable


@dataclass(frozen=True)
class EngineLost:
    """An engine has lost what it keeps on its devices.

    Attributes:
      losses: how often that has happened so far, as in `Engine.losses`. The coordinator may have
        looked there before this event is told; a loss counts once.
    """

    engine: EngineId
    losses: int


Event = StepDone | JobRead | JobArrived | JobWritten | TimerDue | EngineLost


class EventSource(Protocol):
    """Tells what has happened. All calls but `wake` and `post` are made by the thread that drives
    the coordinator."""

    def watch(self, ticket: Ticket[Any], event: Event, queue: Hashable = None) -> None:
        """Tell `event` once a ticket is ready.

        Args:
          queue: tickets watched with the same queue become ready in the order of the calls; None
            where there is no order.
        """
        ...

    def at(self, moment: float, event: Event) -> None:
        """Tell `event` at a moment of the clock, seconds."""
        ...

    def post(self, event: Event) -> None:
        """Tell `event` as soon as possible, and wake whoever waits. Any thread may call this."""
        ...

    def wake(self) -> None:
        """End the current `wait`, or the next one. Any thread may call this."""
        ...

    def poll(self) -> Sequence[Event]:
        """What has happened since the last time, in the order in which it was noticed."""
        ...

    def wait(self) -> None:
        """Return when there may be something to poll, or when woken."""
        ...

    def forget(self) -> None:
        """Tell nothing of what has been watched or asked for so far; what was posted is told."""
        ...
