"""The owner of a mesh: its part in a pool of pages, and a program for each kind of step that it
accepts."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from pdjax.core.ids import EngineId, PoolId
from pdjax.device.kept.ahead import Ahead
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.transports import TransferFuture, Transports
from pdjax.device.programs.program import Program
from pdjax.device.worker import DispatchFuture, DispatchWorker, Done, ask
from pdjax.interfaces.batches import Sampled
from pdjax.interfaces.engine import StepTicket
from pdjax.interfaces.steps import PrefillStep, Step, StepKind
from pdjax.interfaces.tickets import Ticket
from pdjax.interfaces.transport import TransferJob


class StepFuture(DispatchFuture[Sampled]):
    """A step in flight; see `interfaces.StepTicket`.

    Args:
      call: dispatches it.
      exports: its transfers, by their jobs' ids.
    """

    def __init__(
        self, call: Callable[[], Ticket[Sampled]], exports: Mapping[int, TransferFuture]
    ) -> None:
        super().__init__(call)
        self.exports = exports


Groups = Sequence[Sequence[TransferFuture]]
"""What leaves after each layer group."""


class JaxEngine:
    """An engine over devices of this process; see `interfaces.Engine`.

    Args:
      id: the engine's name.
      pool_id: the pool's name.
      pool: that the programs write.
      programs: one for each kind of step that is accepted.
      transports: what the exports of steps leave by.
      worker: of the devices; None dispatches in the thread that calls.
      ahead: compiles what `compile` asks for; None makes one.
    """

    def __init__(
        self,
        id: EngineId,
        pool_id: PoolId,
        pool: PoolOwner,
        programs: Sequence[Program],
        transports: Transports,
        worker: DispatchWorker | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        self.id, self.pool = id, pool_id
        self.layout, self.num_pages = pool.layout, pool.num_pages
        self.programs: dict[StepKind, Program] = {each.kind: each for each in programs}
        self.accepts = frozenset(self.programs)
        self._with_rows = max(programs, key=lambda each: each.rows)
        self.rows = self._with_rows.rows
        self.layer_groups = self.programs.get(StepKind.PREFILL, programs[0]).layer_groups
        self.worker, self.ahead = worker, ahead or Ahead()
        self._pool, self._transports = pool, transports
        self._error: Exception | None = None  # of a call that has no ticket

    @property
    def losses(self) -> int:
        return self._pool.losses + sum(each.losses for each in self.programs.values())

    def compile(self, step: Step) -> Ticket[None]:
        return self.ahead.compile(self._program(step).calls(step))

    def _program(self, step: Step) -> Program:
        program = self.programs.get(step.kind)
        if program is None or step.kind not in self.accepts:
            allowed = " and ".join(sorted(kind.value for kind in self.accepts)) or "no"
            raise ValueError(f"step.kind={step.kind.value}: engine {self.id} takes {allowed} steps")
        return program

    def submit(self, step: Step) -> StepFuture:
        program = self._program(step)
        groups = self._expect_exports(step, len(program.layer_groups))
        exports = {export.job.id: export for export in chain(*groups)}
        future = StepFuture(partial(self._dispatch, program, step, groups), exports)
        try:
            return ask(self.worker, future)
        except BaseException:
            for job_id in exports:  # the caller does not learn of any of them
                self._transports.cancel(job_id)
            raise

    def _dispatch(self, program: Program, step: Step, groups: Groups) -> Ticket[Sampled]:
        def after_group(group: int) -> None:
            for export in groups[group] if groups else ():
                export.make()

        try:
            self._raise_error()
            return program.dispatch(step, after_group)
        except BaseException as error:
            for export in chain(*groups):
                export.give_up(error)
            raise

    def _expect_exports(self, step: Step, num_groups: int) -> Groups:
        """The exports of a step, which leave later.

        Raises:
          ValueError: one that cannot; none is expected then.
        """
        exports = step.exports if isinstance(step, PrefillStep) else ()
        if not exports:
            return ()
        if len(exports) != num_groups:
            raise ValueError(
                f"exports: {len(exports)} groups given; engine {self.id} computes a step in "
                f"{num_groups}, so that must be {num_groups}, or 0"
            )
        groups: list[list[TransferFuture]] = [[] for _ in exports]
        try:
            for group, jobs in enumerate(exports):
                for job in jobs:
                    self._check_export(group, job)
                    groups[group].append(self._transports.expect(job))
        except BaseException:
            for export in chain(*groups):
                self._transports.cancel(export.job.id)
            raise
        return groups

    def _check_export(self, group: int, job: TransferJob) -> None:
        layers = self.layer_groups[group]
        if job.source != self.pool:
            raise ValueError(
                f"exports[{group}]: job {job.id} reads pool {job.source}; must be {self.pool}, "
                f"the pool of engine {self.id}"
            )
        if not (job.layers and set(job.layers) <= set(layers)):
            raise ValueError(
                f"exports[{group}]: job {job.id} takes layers {job.layers}; must be some of "
                f"{layers}, those of the group"
            )

    def set_history(self, row: int, token_ids: np.ndarray) -> None:
        if not 0 <= row < self.rows:
            raise ValueError(f"row={row}: engine {self.id} has {self.rows} rows, from 0")
        self._call(partial(self._with_rows.set_history, row, token_ids))

    def feed(self, row: int, step: StepTicket, index: int) -> None:
        if not 0 <= row < self.rows:
            raise ValueError(f"row={row}: engine {self.id} has {self.rows} rows, from 0")
        assert isinstance(step, StepFuture), "a step of an engine of this process"
        dispatched: Any = step.ticket
        self._call(partial(self._with_rows.feed, row, dispatched.on_devices, index))

    def _call(self, call: Callable[[], None]) -> None:
        """Make a call that has no ticket, in its turn."""
        if self.worker is None:
            call()
        else:
            self.worker.give(DispatchFuture(partial(self._note_error, call)))

    def _note_error(self, call: Callable[[], None]) -> Done[None]:
        """Make a call whose error the next step raises: the call has no ticket."""
        try:
            call()
        except Exception as error:
            self._error = error
        return Done(None)

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        self.ahead.end()
        if self.worker is not None:
            self.worker.rest()
        self._pool.close()
        for each in self.programs.values():
            each.close()
