"""Sequences that go on to decode, or to another engine: the decode and hand-off policies are asked,
and their plans are carried out."""

from pdjax.host.fleet import Fleet
from pdjax.host.handoff.manager import HandoffManager
from pdjax.host.policies.api import Migration, Policies
from pdjax.host.policies.check import check_admissions
from pdjax.host.runtime import Runtime
from pdjax.host.sequences.lifecycle import SequenceLifecycle


class Admissions:
    """Lets prefilled sequences decode, and moves decoding ones, where engines have room.

    Args:
      policies: decode says which are handed over, handoff which change engines.
      fleet, lifecycle: what they see.
      handoffs: move the KV.
      runtime: has the clock.
    """

    def __init__(
        self,
        policies: Policies,
        fleet: Fleet,
        lifecycle: SequenceLifecycle,
        handoffs: HandoffManager,
        runtime: Runtime,
    ) -> None:
        self._policies, self._fleet, self._lifecycle = policies, fleet, lifecycle
        self._handoffs, self._clock = handoffs, runtime.clock

    def admit(self) -> bool:
        """Ask both policies. Returns whether any sequence went on."""
        lifecycle, fleet, policies = self._lifecycle, self._fleet, self._policies
        begun = False
        if lifecycle.prefilled:
            views, now = fleet.views(fleet.for_rows), self._clock.now()
            admissions = policies.decode.admit(lifecycle.prefilled, views, now)
            check_admissions(policies.decode, admissions, lifecycle.prefilled, views)
            for admission in admissions:
                target = fleet.engines[admission.engine]
                if self._handoffs.fits(admission.sequence, target):
                    self._handoffs.begin(admission.sequence, target)
                    begun = True
        return (policies.handoff.migrates and self._migrate()) or begun

    def _migrate(self) -> bool:
        fleet, policy, begun = self._fleet, self._policies.handoff, False
        states = fleet.for_rows
        views, decoding = fleet.views(states), {state.id: state.decoding for state in states}
        prefilled, migrating = self._lifecycle.prefilled, self._handoffs.migrating
        plan = policy.migrations(views, decoding, prefilled, migrating, self._clock.now())
        every = (sequence for sequences in decoding.values() for sequence in sequences)
        check_admissions(policy, plan, every, views, Migration)
        for migration in plan:
            target = fleet.engines[migration.engine]
            if self._handoffs.fits(migration.sequence, target):
                self._handoffs.migrate(migration.sequence, target)
                begun = True
        return begun
