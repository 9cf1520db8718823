"""The turn: what has happened is taken in, and what engines do next is dispatched.

Events come in, plans go out. A turn looks only at engines that something has happened to, and never
waits for a device.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from pdjax.config import Config
from pdjax.core.ids import EngineId
from pdjax.core.roles import Role
from pdjax.host.admissions import Admissions
from pdjax.host.audit import audit
from pdjax.host.engines import EngineState
from pdjax.host.fleet import Fleet, Touched, in_order
from pdjax.host.handoff.deadlines import EXPIRE
from pdjax.host.handoff.manager import HandoffManager
from pdjax.host.handoff.transfer_queue import GIVE_UP
from pdjax.host.health import Health
from pdjax.host.losses import lose_pool
from pdjax.host.metrics.observer import TurnPart
from pdjax.host.pinning import UNPIN, Pinning
from pdjax.host.planning import ASK, PrefillPlanner
from pdjax.host.policies.api import Policies
from pdjax.host.roles.manager import ROLES, RoleManager
from pdjax.host.runners.decode import DecodeRunner
from pdjax.host.runners.mixed import MixedRunner
from pdjax.host.runners.prefill import PrefillRunner
from pdjax.host.runners.steps import Steps
from pdjax.host.runtime import Runtime
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.sequences.output import OutputProcessor
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.host.service import Service
from pdjax.host.shedding import SHED, Shedding
from pdjax.host.tiers.manager import TierManager
from pdjax.host.tiers.moves import GIVE_UP as GIVE_UP_MOVES
from pdjax.host.warm_up import Show, warm_ups
from pdjax.interfaces.engine import Engine
from pdjax.interfaces.events import (
    EngineLost,
    Event,
    JobArrived,
    JobRead,
    JobWritten,
    StepDone,
    TimerDue,
)
from pdjax.interfaces.steps import StepKind
from pdjax.interfaces.transport import Pool, Transport


class Loop:
    """The state of engines and pools, and the turns that change it.

    A loop that an error has broken off is not used again: a new one is made, of which all pages and
    rows are free; see `Coordinator.start_over`.

    Args:
      config: bounds and budgets.
      engines, transport: behind the door.
      policies: decide.
      runtime: events, clock and recorder.
      max_model_len: tokens of the longest sequence.
      end_token_ids: tokens with which the model ends an answer.
      numbers: ids for transfer jobs, of which none comes twice.
      pools: that no engine has.
      services: what each engine is given to do; None lets each do all that it accepts.

    Attributes:
      fleet: engines and pools.
      lifecycle: the live sequences.
      handoffs: the open hand-offs; `roles`: changes what engines do; `tiers`: what is below pools.
    """

    def __init__(
        self,
        config: Config,
        engines: Seq[Engine],
        transport: Transport,
        policies: Policies,
        runtime: Runtime,
        max_model_len: int,
        end_token_ids: Iterable[int],
        numbers: Iterable[int],
        pools: Seq[Pool] = (),
        services: Mapping[EngineId, Service] | None = None,
    ) -> None:
        self._config, self._transport, self._policies = config, transport, policies
        self._clock, self._recorder = runtime.clock, runtime.recorder
        self._guides, self._max_model_len = runtime.guides, max_model_len
        self.fleet = Fleet(
            engines, transport, config, max_model_len, pools, services, runtime.orders
        )
        self.lifecycle = SequenceLifecycle(self.fleet, runtime.recorder, policies)
        self.handoffs = HandoffManager(
            config.handoff,
            self.fleet,
            transport,
            self.lifecycle,
            policies.handoff,
            max_model_len,
            numbers,
            runtime,
        )
        given = max_model_len, numbers, runtime
        self.tiers = TierManager(config, self.fleet, transport, self.lifecycle, policies, *given)
        self._admissions = Admissions(policies, self.fleet, self.lifecycle, self.handoffs, runtime)
        told = self._recorder, end_token_ids, runtime.guides
        self._output = OutputProcessor(self.lifecycle, *told)
        self._health = Health(config.roles, self.fleet, runtime.clock)
        steps = Steps(self.fleet, self.lifecycle, self._health, runtime)
        parts = steps, self.lifecycle, self.handoffs, self._output
        self._pinning = Pinning(self.fleet, self.lifecycle, runtime)
        self._prefill = PrefillRunner(self.fleet, *parts, self._pinning, policies, runtime)
        self._decode = DecodeRunner(*parts, policies.decode, runtime)
        self._mixed = MixedRunner(self._prefill, self._decode, steps, runtime.clock)
        known = self.fleet, self.lifecycle, runtime
        self._planner = PrefillPlanner(policies, *known)
        self._shedding = Shedding(policies.admission, *known)
        seen = self.handoffs, policies, self._health, max_model_len
        self.roles = RoleManager(config.roles, *seen, *known)
        self._due = deque[TimerDue]()
        self._done: Touched = set()  # engines of which a step has come back and is not read
        self._finished: deque[tuple[Sequence, EngineState]] = deque()
        self._is_cut = False  # the last turn, after it has read first tokens

    @property
    def has_work(self) -> bool:
        """Whether a turn may still do something, or there is something to tell."""
        told = bool(self.lifecycle.live) or self.lifecycle.has_news
        busy = self.fleet.busy or self.handoffs.busy or self.tiers.busy
        return told or self._is_cut or busy

    @property
    def idle(self) -> bool:
        """Whether nothing is left to tell or to look at until something happens."""
        lifecycle = self.lifecycle
        changed = lifecycle.waiting_changed or lifecycle.prefilled_changed or self._done
        if self._guides is not None and self._guides.any_done:
            return False
        told = lifecycle.has_news or self._is_cut or self.roles.changed
        return not (told or self.fleet.touched or changed or self.handoffs.sendable)

    @property
    def stalled(self) -> bool:
        """Whether sequences wait to be prefilled while nothing is under way, though all engines are
        in service: the prefill policy has planned nothing, and is not asked before another request
        comes."""
        if not self.lifecycle.waiting or self._planner.is_to_ask:
            return False
        if not self.idle or self.fleet.busy or self.handoffs.busy or self.tiers.busy:
            return False
        if self._guides is not None and self._guides.busy:
            return False
        return not any(state.paused or state.service.outage for state in self.fleet)

    def turn(self, events: Iterable[Event]) -> bool:
        """Take in events, and dispatch what follows from them. Decode goes first, both to be read
        and to be dispatched, since it is the side whose latency is felt with every token. A turn
        that has read first tokens ends there, so that they are told before more is dispatched; the
        turn after it goes to its end. Returns whether anything changed."""
        was_cut, self._is_cut, self._prefill.has_firsts = self._is_cut, False, False
        jobs = self._sort(events)
        busy = self._harvest_decode()
        busy |= self._take_guided()
        busy |= self._write_transfers(jobs)
        busy |= self._dispatch_decode()
        if self._harvest_prefill():
            busy = True
            self._dispatch_decode()  # sequences whose KV is there already need not wait
        self._is_cut = self._prefill.has_firsts and not was_cut
        if self._is_cut:  # first tokens are told now, and the next turn does the rest
            return True
        busy |= self.roles.tend()
        busy |= self._admit()
        busy |= self.handoffs.pump()  # else it would wait for the step that is dispatched next
        busy |= self._dispatch_prefill()
        self._give_back()
        busy |= self.handoffs.pump()
        self.tiers.pump()
        if not self.handoffs.queue.blocked:
            self.tiers.write_ahead()
        return busy

    def _sort(self, events: Iterable[Event]) -> list[Event]:
        """Count the steps that have come back, and see to timers and lost engines; returns the
        events of transfer jobs."""
        jobs: list[Event] = []
        for event in events:
            if isinstance(event, StepDone):
                state = self.fleet.engines[event.engine]
                state.came_back += 1
                self._done.add(state)
            elif isinstance(event, TimerDue):
                self._due.append(event)
            elif isinstance(event, EngineLost):
                state = self.fleet.engines[event.engine]
                if state.losses < event.losses:
                    self._health.failed(state, "a loss of its pool", self._clock.now())
                    self._lose(state)
                    state.losses = max(state.losses, event.losses)
            else:
                jobs.append(event)
        return jobs

    # The parts of a turn, in its order. Each returns whether it changed anything; one for which
    # nothing has happened does not begin.

    def _harvest_decode(self) -> bool:
        if not self._done:
            return False
        self._recorder.observer.part_began(TurnPart.HARVEST_DECODE)
        busy = False
        for state in self._with_results(StepKind.DECODE, StepKind.MIXED):
            done: Any = state.in_flight.popleft()
            runner = self._mixed if done.kind is StepKind.MIXED else self._decode
            for sequence in runner.harvest(state, done):
                self._finished.append((sequence, state))
            busy = True
        return busy

    def _take_guided(self) -> bool:
        """Let the sequences go on whose next tokens are known to be allowed."""
        if self._guides is None or not self._guides.busy:
            return False
        busy = False
        for each in self._guides.take():
            sequence, busy = each.sequence, True
            decoding = sequence.state is State.DECODING
            state = self.lifecycle.engine_of(sequence) if decoding else None
            if self._output.take(each) and state is not None:
                self._finished.append((sequence, state))
        return busy

    def _with_results(self, *kinds: StepKind) -> Iterator[EngineState]:
        """Engines whose oldest step in flight has come back and is of these kinds, once for each
        such step. An engine works in order. The sequences of a step that computed from an empty
        pool have been preempted when it is handed out. No tick is, while a row runs ahead: the
        token that it was given is read first."""
        for state in in_order(self._done):
            while state.came_back and (kind := state.in_flight[0].kind) in kinds:
                if kind is StepKind.DECODE and state.rows.ahead is not None:
                    break
                state.came_back -= 1
                self._notice_losses(self.fleet.sharing(state.pool))
                yield state
                self.fleet.stepped(state)
            if not state.came_back:
                self._done.remove(state)

    def _notice_losses(self, states: Iterable[EngineState]) -> None:
        """Preempt the sequences that have KV in a lost pool, and forget its prefixes."""
        for state in states:
            if state.losses < state.engine.losses:
                self._lose(state)

    def _lose(self, state: EngineState) -> None:
        for each in self.fleet.sharing(state.pool):
            each.losses = max(each.losses, each.engine.losses)
        lose_pool(state.pool, self.lifecycle, self.handoffs.open)
        self.handoffs.queue.pool_lost(state.pool.id)
        self.tiers.pool_lost(state.pool)

    def _write_transfers(self, events: Seq[Event]) -> bool:
        """Write what has arrived, and let the sequences decode whose KV is complete."""
        if not events and not self._due:
            return False
        self._recorder.observer.part_began(TurnPart.WRITE_TRANSFERS)
        queue, busy = self.handoffs.queue, False
        ends: Touched = set()
        for event in events:
            match event:
                case JobRead(job_id):
                    queue.job_read(job_id)
                case JobArrived(job_id):
                    ends |= self._ends(job_id)
                    queue.job_arrived(job_id)
                    busy = True
                case JobWritten(job_id):
                    ends |= self._ends(job_id)
                    queue.job_written(job_id)
                    busy = True
        self._notice_losses(ends)  # before a sequence decodes from what was read of an empty pool
        self.tiers.take(events)
        self.handoffs.settle()
        while self._due:
            due = self._due.popleft()
            if due == GIVE_UP:
                queue.give_up()
            elif due == GIVE_UP_MOVES:
                self.tiers.moves.give_up()
            elif due == EXPIRE:
                busy |= self.handoffs.expire()
            elif due == ASK:
                self.fleet.to_plan.update(self.fleet.prefill)
            elif due == UNPIN:  # what waits for the pages is planned anew
                self._pinning.expire()
            elif due == SHED:
                self._shedding.is_due = True
            elif due == ROLES:
                self.roles.is_due = True
        return busy | self.handoffs.ahead.begin()

    def _ends(self, job_id: int) -> Touched:
        """The engines at both ends of a job."""
        sharing = self.fleet.sharing_of
        pools = (*self.handoffs.queue.ends_of(job_id), *self.tiers.moves.ends_of(job_id))
        return {state for pool in pools for state in sharing(pool)}

    def _dispatch_decode(self) -> bool:
        if not self.fleet.to_tick:
            return False
        self._recorder.observer.part_began(TurnPart.DISPATCH_DECODE)
        touched, self.fleet.to_tick = self.fleet.to_tick, set()
        self._notice_losses(touched)
        states = [state for state in in_order(touched) if not self._may_join(state)]
        return self._decode.dispatch(states)

    def _may_join(self, state: EngineState) -> bool:
        """Whether chunks may join the next tick of an engine, which is then dispatched with the
        prefill steps."""
        if not state.mixes or state.role is not Role.DECODE:
            return state.mixes
        waits = self._policies.placement.local and bool(self.lifecycle.waiting)
        return waits or bool(state.running)

    def _harvest_prefill(self) -> bool:
        if not self._done:
            return False
        self._recorder.observer.part_began(TurnPart.HARVEST_PREFILL)
        busy = False
        for state in self._with_results(StepKind.PREFILL):
            self._prefill.harvest(state, state.in_flight.popleft())
            busy = True
        return busy

    def _admit(self) -> bool:
        """Let prefilled sequences decode, and move decoding ones, where engines have room."""
        lifecycle, fleet = self.lifecycle, self.fleet
        if not fleet.to_admit and not lifecycle.prefilled_changed:
            return False
        self._recorder.observer.part_began(TurnPart.ADMIT)
        fleet.to_admit.clear()
        lifecycle.prefilled_changed = False
        return self._admissions.admit()

    def _dispatch_prefill(self) -> bool:
        fleet, lifecycle = self.fleet, self.lifecycle
        self._shedding.shed()
        if not fleet.to_plan and not lifecycle.waiting_changed:
            return False
        self._recorder.observer.part_began(TurnPart.DISPATCH_PREFILL)
        touched, fleet.to_plan, lifecycle.waiting_changed = fleet.to_plan, set(), False
        self._notice_losses(touched)
        busy = self.tiers.look()  # what comes up is not planned for yet
        plans = self._planner.plans(touched)
        for state in in_order(touched):  # their rows, whether chunks join them or not
            if state.mixes and state.takes_tick:
                busy |= self._mixed.dispatch(state, plans.pop(state.id, ()))
        for engine, chunks in plans.items():
            state, busy = fleet.engines[engine], True
            if state.mixes:
                self._mixed.dispatch(state, chunks)
            else:
                self._prefill.dispatch(state, chunks)
        return busy

    def _give_back(self) -> None:
        """Not as soon as sequences end: the KV of a turn's own sequences goes first."""
        while self._finished:
            sequence, state = self._finished.popleft()
            if self._policies.handoff.returns and sequence.home is not None:
                home = self.fleet.engines[sequence.home]
                if home.takes_prompts:
                    self.handoffs.give_back(sequence, state.pool, home.pool)

    # Before and after.

    def warm_up(self, show: Show | None = None) -> int:
        """Send a batch of every bucket through the door; see `Coordinator.warm_up`."""
        given = self.fleet, self._transport, self.handoffs.spans, self._config
        sizes = self.tiers.sizes()
        compiling, running = warm_ups(*given, self._max_model_len, self._recorder, sizes)
        for what, todo in (("compiling", compiling), ("trying each once", running)):
            for warm_up in todo if show is None else show(todo, what):
                warm_up()
        return len(running)

    def check(self) -> None:
        """Assert that every page and row is free, or held by a sequence or hand-off that is
        known."""
        audit(self.fleet, self.lifecycle, self.handoffs, self.tiers)
        self.roles.check()
