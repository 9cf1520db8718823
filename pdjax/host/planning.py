"""Prefill steps to come: the prefill policy is asked, and its plans are checked."""

from collections.abc import Collection
from dataclasses import replace

from pdjax.core.ids import EngineId
from pdjax.host.batching.chunks import Chunk
from pdjax.host.engines import EngineState
from pdjax.host.fleet import Fleet, in_order
from pdjax.host.handoff.deadlines import NEVER
from pdjax.host.policies.api import AskAgain, EngineView, Policies
from pdjax.host.policies.check import check_steps, mixed_tokens_of
from pdjax.host.runtime import Runtime
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.interfaces.events import TimerDue

ASK = TimerDue("prefill policy")


class PrefillPlanner:
    """Asks the prefill policy about engines that something has happened to, and when it wants to be
    asked.

    Args:
      policies: prefill plans steps; placement says which engines are asked about, and how many
        prompt tokens may join rows.
      fleet, lifecycle: what it sees.
      runtime: timers and clock.
    """

    def __init__(
        self,
        policies: Policies,
        fleet: Fleet,
        lifecycle: SequenceLifecycle,
        runtime: Runtime,
    ) -> None:
        self._policy, self._placement = policies.prefill, policies.placement
        self._fleet, self._lifecycle = fleet, lifecycle
        self._events, self._clock = runtime.events, runtime.clock
        self._asks_at = NEVER  # or when the policy is asked, whatever happens

    @property
    def is_to_ask(self) -> bool:
        """Whether a moment is to come at which the policy is asked, whatever happens."""
        return self._clock.now() < self._asks_at < NEVER

    def plans(self, touched: Collection[EngineState]) -> dict[EngineId, tuple[Chunk, ...]]:
        """The chunks of the next step of each engine that is to have one: of all that are open
        while a sequence waits, else of those that something has happened to."""
        views = self._views(touched)
        if not any(view.open for view in views):
            return {}
        waiting, now = self._lifecycle.waiting, self._clock.now()
        plans = self._policy.plan(waiting, views, now)
        check_steps(self._policy, plans, views, now)
        chunks = {}
        for plan in plans:
            if isinstance(plan, AskAgain):
                self._ask_again(plan.at, now)
            else:
                chunks[plan.engine] = plan.chunks
        return chunks

    def _views(self, touched: Collection[EngineState]) -> list[EngineView]:
        """What the policy sees. A placement that goes by load sees the engines that are not open,
        too: a prompt may wait for one of them."""
        fleet, local = self._fleet, self._placement.local
        if not self._lifecycle.waiting:
            views = fleet.prompt_views(state for state in in_order(touched) if state.goes_on)
        elif local:
            states = [each for each in fleet.prefill if each.takes_any or each.goes_on]
            views = fleet.prompt_views(states, local=True)
        else:
            states = [state for state in fleet.prefill if state.takes_prompts or state.goes_on]
            views = [view for view in fleet.prompt_views(states) if view.open]
        return [view if view.beside_rows is None else self._paced(view) for view in views]

    def _paced(self, view: EngineView) -> EngineView:
        """A view of an engine whose rows wait for its chunks: of no more tokens than they may."""
        tokens = mixed_tokens_of(self._placement, view)
        return view if tokens == view.beside_rows else replace(view, beside_rows=tokens)

    def _ask_again(self, moment: float, now: float) -> None:
        """Ask the policy at a moment, unless it will be asked before anyway."""
        if not now < self._asks_at <= moment:
            self._asks_at = moment
            self._events.at(moment, ASK)
