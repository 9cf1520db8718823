"""What a role policy sees and answers; `policies/api.py` says what all policies have in common."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from pdjax.core.ids import EngineId
from pdjax.core.roles import Role
from pdjax.host.sequences.sequence import Sequence
from pdjax.host.step_times import StepTimes


@dataclass(frozen=True)
class RoleView:
    """An engine in service, as a role policy sees it.

    Attributes:
      engine: its name.
      role: what it is given.
      options: the roles that it may have instead now: it accepts their steps, and the other engines
        serve what it would leave.
      token_budget: most prompt tokens of a step.
      backlog: prompt tokens that it has been given and has not finished.
      rows: decode rows, all of them; `taken_rows`: those that are not free.
      prefill_times, token_times: as in `EngineView`.
    """

    engine: EngineId
    role: Role
    options: frozenset[Role]
    token_budget: int
    backlog: int
    rows: int
    taken_rows: int
    prefill_times: StepTimes = field(default_factory=StepTimes)
    token_times: StepTimes = field(default_factory=StepTimes)


@dataclass(frozen=True)
class Load:
    """What there is to do.

    Attributes:
      waiting: the queue; `prefilled`: sequences that wait for room to decode.
      arrived_tokens: of prompts that have come since the policy was last asked.
      seconds: since then.
    """

    waiting: Seq[Sequence]
    prefilled: Seq[Sequence]
    arrived_tokens: int
    seconds: float


@dataclass(frozen=True)
class RoleChange:
    """An engine is to have another role: it is given no more of what that leaves out, and has the
    new role when it has ended what it had.

    Attributes:
      engine: its name.
      role: one of its options.
      cause: for a reader, with numbers.
    """

    engine: EngineId
    role: Role
    cause: str


class RolePolicy(Protocol):
    """Decides which engines change what they do. It may remember what it has seen and answered, and
    nothing else: the same questions have the same answers.

    Attributes:
      changes: whether `change` may ever name an engine; else it is not asked.
    """

    changes: bool

    def change(self, engines: Seq[RoleView], load: Load, now: float) -> Seq[RoleChange]:
        """At most one engine, which changes now: what others may become depends on it. It is asked
        every `roles.interval` seconds while anything is under way and no engine drains.

        Args:
          engines: all that are in service.
        """
        ...
