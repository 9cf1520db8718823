"""Work in flight."""

from typing import Protocol, TypeVar

ResultT = TypeVar("ResultT", covariant=True)


class Ticket(Protocol[ResultT]):
    """Work that has been asked for and may not have ended."""

    def ready(self) -> bool:
        """Whether `result` would return without waiting, or raise."""
        ...

    def result(self) -> ResultT:
        """The outcome; waits for it. The same object every time.

        Raises:
          Exception: what went wrong, also in the call that asked for the work.
        """
        ...
