"""Random days on which engines change what they do, and go out of service and come back."""

import random

from pdjax.core.roles import Role
from pdjax.host.sequences.news import Progress
from pdjax.host.service import Status
from tests.helpers.workload import Workload

MOST_CHANGES = 40
"""Changes a workload: a sequence that starts over for ever never ends."""


class Shifting(Workload):
    """A workload whose engines are given other roles at random moments, or none. That is no fault:
    all tokens must come, and be right."""

    mixed_engines = (1, 2, 2, 3)

    def __init__(self, seed: int, *, faults: bool = False) -> None:
        super().__init__(seed, faults=faults)
        self._changes, self._shift = 0, random.Random(f"changes of roles in {seed}")

    def _step(self) -> list[Progress]:
        if self._changes < MOST_CHANGES and self._shift.random() < 0.2:
            self._change()
        news = super()._step()
        for state in self.coordinator.loop.fleet:
            self.happened[f"{state.service.status.value}"] += 1
            if state.service.status is Status.DRAINING and (state.running or state.decoding):
                self.happened["drained at work"] += 1
            self.happened["stood in"] += state.service.stands_in is not None
        return news

    def _change(self) -> None:
        state = self._shift.choice(list(self.coordinator.loop.fleet))
        role = self._shift.choice((Role.PREFILL, Role.DECODE, Role.MIXED, None))
        try:
            self.coordinator.set_role(state.id, role)
        except ValueError:
            self.happened["change refused"] += 1
        else:
            self._changes += 1
