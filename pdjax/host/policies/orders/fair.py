"""Shares of the service by weights of tenants: virtual token counters."""

from collections.abc import Collection
from collections.abc import Sequence as Seq
from heapq import heapify, heappop, heappush
from typing import Any

from pdjax.host.policies.api import EngineView, PolicySetup, StepPlan
from pdjax.host.policies.packing import Packer
from pdjax.host.sequences.queue import SequenceQueue
from pdjax.host.sequences.sequence import Sequence, State

_TENANT_LABELS = ("tenant", "api_key", "user")
"""Labels that say whose a request is; the first that it has counts. The server sets `api_key`, the
name of the key, for each request where it has keys; `user` is what the body says of itself."""

_MOST_IDLE = 1000
"""Tenants with nothing to do whose counters are kept before the needless ones are dropped; as many
sequences that have ended."""


def tenant_of(sequence: Sequence) -> str:
    """Whose it is; "" for a request without any of these labels."""
    labels = sequence.request.labels
    return next((labels[name] for name in _TENANT_LABELS if name in labels), "")


class _Answers:
    """Answers of a tenant that are charged as they grow."""

    __slots__ = ("outputs", "sequences", "written")

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.outputs: list[list[int]] = []  # of the sequences
        self.written = 0  # tokens of all of them that have been charged

    def add(self, sequence: Sequence, written: int) -> None:
        """Watch an answer, of which so many tokens need not be charged."""
        self.sequences.append(sequence)
        self.outputs.append(sequence.output)
        self.written += written

    def take(self) -> int:
        """Tokens that have been written since the last time."""
        before, self.written = self.written, sum(map(len, self.outputs))
        return max(0, self.written - before)

    def drop_ended(self) -> list[Sequence]:
        """Watch those no more that have ended; returns them."""
        ended = [each for each in self.sequences if each.done]
        self.sequences = [each for each in self.sequences if not each.done]
        self.outputs = [each.output for each in self.sequences]
        self.written = sum(map(len, self.outputs))
        return ended


class FairPrefill(Packer):
    """Packs prompts of the tenant that has been served least (VTC, virtual token counters: Sheng et
    al., "Fairness in Serving Large Language Models", OSDI 2024).

    A tenant is charged for each prompt when it begins, by the tokens that had to be computed, and
    for each token of its answers, `policies.output_weight` times; all divided by its weight of
    `policies.tenant_weights`. A tenant that comes back after it had nothing waiting is lifted to
    the least counter of those who wait, so that it has no credit of an idle time. While two tenants
    both have prompts waiting, what they are charged differs from their shares by what fits into
    the engines at once at the most, plus one prompt. Within a tenant the oldest goes first.

    Shares hold between tenants that clients can't make up. Of a server without API keys a client
    that sends a new `user` each time is a new tenant each time: lifted to the least counter, it is
    served next, and takes most of the service.

    If the first of the tenant whose turn it is finds no room, no other overtakes it. The policy
    remembers its counters, and what it has charged for sequences that have begun. A plan costs the
    host what grows with the tenants that wait, and with the sequences that have begun, not with
    those that wait.
    """

    def __init__(self, setup: PolicySetup) -> None:
        super().__init__(setup)
        self._weights = dict(setup.config.policies.tenant_weights)
        self._output_weight = setup.config.policies.output_weight
        self._counters: dict[str, float] = {}
        self._begun: set[Sequence] = set()  # charged for their prompts
        self._silent: dict[Sequence, int] = {}  # those without a token, and that charge
        self._answers: dict[str, _Answers] = {}  # by tenant, of the others
        self._queued: set[Any] = set()  # tenants with something in the queue when last asked
        self._last = ""  # the tenant that left the queue last
        self._prune_counters_at = self._prune_begun_at = _MOST_IDLE

    def group(self, sequence: Sequence) -> str:
        """See `Grouped`."""
        return tenant_of(sequence)

    def plan(self, waiting: SequenceQueue, engines: Seq[EngineView], now: float) -> list[StepPlan]:
        """See `PrefillPolicy`."""
        self._charge_begun()
        self._lift(waiting.groups.keys())
        draft, turns = self.draft(engines, now), list[Any]()
        for queue in waiting.groups.values():
            rest = iter(queue)
            first = next(rest)
            tenant = tenant_of(first)
            turns.append((self._counters[tenant], first.order, tenant, first, rest))
        heapify(turns)
        while turns:
            _, _, tenant, sequence, rest = heappop(turns)
            tokens = self.place(sequence, draft)
            if not tokens and not draft.passes(sequence):
                break
            if tokens and sequence not in self._begun:  # one that was preempted has been charged
                self._begin(sequence, tenant, tokens)
            following = next(rest, None)
            if following is not None:
                turn = self._counters[tenant], following.order, tenant, following, rest
                heappush(turns, turn)
        return list(draft.plans())

    def served(self, tenant: str) -> float:
        """What a tenant has been charged by its weight; more where it was lifted."""
        return self._counters.get(tenant, 0.0)

    def _begin(self, sequence: Sequence, tenant: str, tokens: int) -> None:
        """Charge a prompt of which so many tokens are computed."""
        self._begun.add(sequence)
        self._charge(tenant, tokens)
        if sequence.output:
            self._watch(sequence, len(sequence.output))
        else:
            self._silent[sequence] = tokens

    def _watch(self, sequence: Sequence, written: int = 0) -> None:
        self._answers.setdefault(tenant_of(sequence), _Answers()).add(sequence, written)

    def _charge(self, tenant: str, tokens: float) -> None:
        counter = self._counters.get(tenant, 0.0)
        self._counters[tenant] = counter + tokens / self._weights.get(tenant, 1.0)

    def _charge_begun(self) -> None:
        """Charge what sequences have written since the last time. A plan of the last time may not
        have been carried out: a sequence that still waits and has written nothing is not charged
        for its prompt."""
        for sequence, prompt in list(self._silent.items()):
            if sequence.output:
                self._watch(sequence)
            elif sequence.state is State.WAITING:
                self._charge(tenant_of(sequence), -prompt)
                self._begun.remove(sequence)
            elif sequence.done:
                self._begun.remove(sequence)
            else:
                continue
            del self._silent[sequence]
        for tenant, answers in self._answers.items():
            if written := answers.take():
                self._charge(tenant, self._output_weight * written)
        if len(self._begun) > self._prune_begun_at:
            for answers in self._answers.values():
                self._begun.difference_update(answers.drop_ended())
            self._answers = {name: each for name, each in self._answers.items() if each.sequences}
            self._prune_begun_at = 2 * len(self._begun) + _MOST_IDLE

    def _lift(self, queued: Collection[Any]) -> None:
        """Give tenants that come back no credit of the time in which they had nothing waiting."""
        queued = set(queued)
        stayed, gone = self._queued & queued, self._queued - queued
        if gone:
            self._last = max(gone, key=lambda name: (self.served(name), name))
        least = min(map(self.served, stayed), default=self.served(self._last))
        for tenant in queued - self._queued:
            self._counters[tenant] = max(self.served(tenant), least)
        self._queued = queued
        if len(self._counters) > self._prune_counters_at:
            busy = {*queued, self._last, *map(tenant_of, self._begun)}
            kept = {name for name in self._counters if name in busy or self.served(name) > least}
            self._counters = {name: self._counters[name] for name in kept}
            self._prune_counters_at = 2 * len(kept) + _MOST_IDLE
