"""Work in flight."""

from typing import Protocol, TypeVar

ResultT = TypeVar("ResultT", covariant=True)


class Ticket(Protocol[ResultT]):
    """Work dispatched to a mesh."""

    def ready(self) -> bool:
        """Whether `result` would return without waiting."""
        ...

    def result(self) -> ResultT:
        """The outcome; waits for it. The same object every time."""
        ...
