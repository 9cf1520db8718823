"""What an engine does with the steps of one kind, as a protocol."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from pdjax.device.kept.ahead import Call
from pdjax.interfaces.batches import Sampled
from pdjax.interfaces.steps import StepKind
from pdjax.interfaces.tickets import Ticket

AfterGroup = Callable[[int], None]
"""Called with g when layer group g has been dispatched, and nothing that comes after it."""


class Program(Protocol):
    """The compiled steps of one kind over the weights and the pool of an engine, and the state that
    lives on the devices from one of these steps to the next.

    A batch of nothing but padding is a rehearsal: every variant of choosing tokens runs on it, so
    that a warm-up need not know that there are any. Where this process has run it before, with the
    same programs and shapes, nothing runs, since all of it is compiled.

    Attributes:
      kind: of its steps.
      layer_groups: global layers that a step computes in one go, in order.
      rows: whose history it keeps; 0 where it keeps none.
    """

    kind: StepKind
    layer_groups: tuple[range, ...]
    rows: int

    @property
    def losses(self) -> int:
        """How often the state was lost and has been made again, beside losses of the pool."""
        ...

    def dispatch(self, step: Any, after_group: AfterGroup) -> Ticket[Sampled]:
        """Dispatch a step of the kind. An error leaves a sound pool and sound state, which may be
        empty."""
        ...

    def calls(self, step: Any) -> Iterator[Call]:
        """The programs that a dispatch of the step calls, with arguments of the same shapes. Those
        of a rehearsal are all that steps of its shapes may need."""
        ...

    def feed(self, row: int, tokens: jax.Array | np.ndarray, index: int) -> None:
        """See `Engine.feed`; of a program that has rows. `tokens` are i32[B], whole on each device
        of a mesh."""
        ...

    def set_history(self, row: int, token_ids: np.ndarray) -> None:
        """See `Engine.set_history`; of a program that has rows."""
        ...

    def close(self) -> None:
        """Let go of the weights and of the state."""
        ...
