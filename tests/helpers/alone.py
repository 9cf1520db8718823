"""Random days on which requests come one at a time, so that rows run ahead."""

from dataclasses import replace

from pdjax.config import HandoffConfig
from tests.helpers.workload import Visit, Workload


class Alone(Workload):
    """A workload whose requests wait for one another; KV leaves as it is computed."""

    def _handoff_config(self) -> HandoffConfig:
        config = super()._handoff_config()
        return replace(
            config,
            streaming=True,
            checksums=False,
            after_tokens=0,
            stay_below=0,
            max_bytes_in_flight=None,
        )

    def _visit(self, name: str) -> Visit:
        """Most of them ask for nothing that takes the host between two tokens."""
        visit = super()._visit(name)
        if self.random.random() < 0.8:
            request = visit.request
            plain = replace(
                request.params,
                n=1,
                max_tokens=None,
                presence_penalty=0.0,
                repetition_penalty=1.0,
                guide=None,
                allowed_token_ids=None,
                min_tokens=0,
            )
            visit.request = replace(request, params=plain)
        return visit

    def _submit(self, visit: Visit, step: int) -> bool:
        return not self.coordinator.has_work and super()._submit(visit, step)

    def _lose_patience(self, visit: Visit, step: int) -> None:
        open_ = self.coordinator.loop.handoffs.open
        ahead = {each.sequence for each in open_ if each.ahead} & set(visit.sequences)
        self.happened["ran ahead"] += len(ahead)
        super()._lose_patience(visit, step)
