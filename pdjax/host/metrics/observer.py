"""What an experiment can watch of a coordinator's work, instead of patching its methods."""

import enum

from pdjax.core.ids import EngineId
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.interfaces.steps import StepKind
from pdjax.interfaces.transport import TransferJob


class TurnPart(enum.Enum):
    """What a coordinator is doing in a turn. A part may come more than once in a turn, or not at
    all; the values are the names in reports."""

    HARVEST_DECODE = "harvest decode"
    WRITE_TRANSFERS = "write transfers"
    DISPATCH_DECODE = "dispatch decode"
    HARVEST_PREFILL = "harvest prefill"
    ADMIT = "admit"
    DISPATCH_PREFILL = "dispatch prefill"
    WAIT = "wait"


class Observer:
    """Hooks that a coordinator calls; each does nothing here. A subclass overrides what it needs.

    The thread that drives the turn calls the hooks, in the middle of the turn. So a hook returns
    soon, calls neither the coordinator nor a session, and raises nothing: an error breaks the turn
    off like an error of a policy. Moments are seconds on the coordinator's clock.
    """

    def turn_began(self) -> None:
        """A turn begins. What it does until the first `part_began` belongs to no part."""

    def part_began(self, part: TurnPart) -> None:
        """The turn goes on to `part`, which lasts until the next part begins or the turn ends."""

    def turn_ended(self, busy: bool) -> None:
        """The turn has ended; `busy`: whether it changed anything. A turn that was broken off by an
        error ends, too."""

    def step_submitted(
        self, engine: EngineId, kind: StepKind, tokens: int, rows: int, start: float
    ) -> None:
        """An engine was given a step.

        Args:
          tokens: prompt tokens of a prefill step, padding not counted; active rows of a tick.
          rows: sequences of a prefill step; active rows of a tick.
          start: moment of the dispatch.
        """

    def step_done(
        self, engine: EngineId, kind: StepKind, tokens: int, rows: int, start: float, end: float
    ) -> None:
        """A step has come back, well or not; `end`: moment at which that was seen. The other
        arguments are those of its `step_submitted`."""

    def sequence_moved(self, sequence: Sequence, before: State, after: State) -> None:
        """A sequence has gone from one state to another. It holds what it holds in `after`. One
        that starts over while it waits goes from WAITING to WAITING."""

    def job_sent(self, job: TransferJob) -> None:
        """A transfer job was given to its transport, by itself or as an export of a step."""

    def job_arrived(self, job: TransferJob) -> None:
        """Every piece of a transfer job has arrived at the target's mesh."""

    def job_written(self, job: TransferJob) -> None:
        """The pages of a transfer job have been written into the target's pool."""
