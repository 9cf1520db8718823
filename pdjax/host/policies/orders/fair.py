"""Shares of the service by weights of tenants: virtual token counters."""

from collections import deque
from collections.abc import Sequence as Seq

from pdjax.host.policies.api import EngineView, PolicySetup, StepPlan
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.sequences.sequence import Sequence, State

_TENANT_LABELS = ("tenant", "api_key", "user")
"""Labels that say whose a request is; the first that it has counts. The server sets `api_key`, the
name of the key, for each request where it has keys; `user` is what the body says of itself."""

_MOST_IDLE = 1000
"""Counters of tenants with nothing to do that are kept before the needless ones are dropped."""


def tenant_of(sequence: Sequence) -> str:
    """Whose it is; "" for a request without any of these labels."""
    labels = sequence.request.labels
    return next((labels[name] for name in _TENANT_LABELS if name in labels), "")


class FairPrefill(FcfsPrefill):
    """Packs prompts of the tenant that has been served least (VTC, virtual token counters: Sheng et
    al., "Fairness in Serving Large Language Models", OSDI 2024).

    A tenant is charged for each prompt when it begins, by the tokens that had to be computed, and
    for each token of its answers, `output_weight` times; all divided by its weight of
    `policies.tenant_weights`. A tenant that comes back after it had nothing waiting is lifted to
    the least counter of those who wait, so that it has no credit of an idle time. While two tenants
    both have prompts waiting, what they are charged differs from their shares by what fits into
    the engines at once at the most, plus one prompt. Within a tenant the oldest goes first.

    Shares hold between tenants that clients can't make up. Of a server without API keys a client
    that sends a new `user` each time is a new tenant each time: lifted to the least counter, it is
    served next, and takes most of the service.

    If the first of the tenant whose turn it is finds no room, no other overtakes it. The policy
    remembers its counters, and what it has charged for sequences that have begun.

    Attributes:
      output_weight: charge of a token of an answer, where one of a prompt costs 1.
    """

    output_weight: float = 2.0

    def __init__(self, setup: PolicySetup) -> None:
        super().__init__(setup)
        self._weights = dict(setup.config.policies.tenant_weights)
        self._counters: dict[str, float] = {}
        self._begun: dict[Sequence, tuple[int, int]] = {}  # tokens charged: of prompt, of answer
        self._queued: set[str] = set()  # tenants with something in the queue when last asked
        self._last = ""  # the tenant that left the queue last
        self._prune_at = _MOST_IDLE

    def plan(self, waiting: Seq[Sequence], engines: Seq[EngineView], now: float) -> list[StepPlan]:
        """See `PrefillPolicy`."""
        self._charge_begun()
        queues: dict[str, deque[Sequence]] = {}
        for sequence in waiting:
            queues.setdefault(tenant_of(sequence), deque()).append(sequence)
        self._lift(set(queues))
        draft = self.draft(engines, now)
        while queues:
            tenant = min(queues, key=lambda name: (self._counters[name], queues[name][0].order))
            sequence = queues[tenant].popleft()
            tokens = self.place(sequence, draft)
            if not tokens and not draft.passes(sequence):
                break
            if tokens and sequence not in self._begun:  # one that was preempted has been charged
                self._begun[sequence] = tokens, len(sequence.output)
                self._charge(tenant, tokens)
            if not queues[tenant]:
                del queues[tenant]
        return list(draft.plans())

    def served(self, tenant: str) -> float:
        """What a tenant has been charged by its weight; more where it was lifted."""
        return self._counters.get(tenant, 0.0)

    def _charge(self, tenant: str, tokens: float) -> None:
        counter = self._counters.get(tenant, 0.0)
        self._counters[tenant] = counter + tokens / self._weights.get(tenant, 1.0)

    def _charge_begun(self) -> None:
        """Charge what sequences have written since the last time. A plan of the last time may not
        have been carried out: a sequence that still waits and has written nothing is not charged
        for its prompt."""
        for sequence, (prompt, written) in list(self._begun.items()):
            output, tenant = len(sequence.output), tenant_of(sequence)
            if sequence.state is State.WAITING and not output:
                self._charge(tenant, -prompt)
                del self._begun[sequence]
                continue
            if output > written:
                self._charge(tenant, self.output_weight * (output - written))
                self._begun[sequence] = prompt, output
            if sequence.done:
                del self._begun[sequence]

    def _lift(self, queued: set[str]) -> None:
        """Give tenants that come back no credit of the time in which they had nothing waiting."""
        stayed, gone = self._queued & queued, self._queued - queued
        if gone:
            self._last = max(gone, key=lambda name: (self.served(name), name))
        least = min(map(self.served, stayed), default=self.served(self._last))
        for tenant in queued - self._queued:
            self._counters[tenant] = max(self.served(tenant), least)
        self._queued = queued
        if len(self._counters) > self._prune_at:
            busy = {*queued, self._last, *map(tenant_of, self._begun)}
            kept = {name for name in self._counters if name in busy or self.served(name) > least}
            self._counters = {name: self._counters[name] for name in kept}
            self._prune_at = 2 * len(kept) + _MOST_IDLE
