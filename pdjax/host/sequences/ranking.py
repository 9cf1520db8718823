"""The places of sequences in their queues, and their groups, as policies say."""

from collections.abc import Callable, Hashable
from typing import Any

from pdjax.host.policies.api import Policies
from pdjax.host.policies.check import rank_of
from pdjax.host.sequences.sequence import Sequence, State, age


class Ranking:
    """Asks the policies that give a queue an order of its own; other queues keep the oldest first.

    Args:
      policies: prefill has the queue, decode the sequences that wait for room; None has neither.

    Attributes:
      group: of a sequence of the queue; None keeps no groups.
    """

    def __init__(self, policies: Policies | None) -> None:
        self.group: Callable[[Sequence], Hashable] | None = None
        self._policies: dict[State, Any] = {}
        if policies is None:
            return
        group = getattr(policies.prefill, "group", None)
        self.group = group if callable(group) else None
        for state, policy in (
            (State.WAITING, policies.prefill),
            (State.PREFILLED, policies.decode),
        ):
            if callable(getattr(policy, "rank", None)):
                self._policies[state] = policy

    def rank(self, sequence: Sequence) -> Any:
        """What a sequence goes by in the queue of its state, the least first.

        Raises:
          BadPlan: a policy's answer is no rank.
        """
        policy = self._policies.get(sequence.state)
        return age(sequence) if policy is None else rank_of(policy, sequence)
