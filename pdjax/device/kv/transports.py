"""All transports between the pools of this process. A job is sent by the first transport that
connects its pools.

A transport moves pages over one kind of link and knows nothing of threads. `Transports` keeps the
order: the worker of a pool's devices, if there is one, makes every call that reads or writes the
pool.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from pdjax.core.ids import PoolId
from pdjax.device.worker import DispatchFuture, DispatchWorker, ask
from pdjax.interfaces.tickets import Ticket
from pdjax.interfaces.transport import TransferCost, TransferJob, Transport


class CancelledJobError(RuntimeError):
    """A transfer job was cancelled before it left."""


class TransferFuture(DispatchFuture[TransferCost]):
    """A transfer job that leaves when `make` is called.

    Args:
      job: what moves.
      transport: what moves it.
    """

    def __init__(self, job: TransferJob, transport: Transport) -> None:
        super().__init__(partial(transport.send, job))
        self.job, self.transport = job, transport

    @property
    def read(self) -> Ticket[None]:
        return _ReadTicket(self)


class _ReadTicket:
    """Ready when the pages of a job have been read, or when the job has failed before."""

    def __init__(self, future: TransferFuture) -> None:
        self._future = future

    @property
    def _read(self) -> Ticket[None]:
        sent: Any = self._future.ticket
        return sent.read

    def ready(self) -> bool:
        return self._future.made and (self._future.failed or self._read.ready())

    def result(self) -> None:
        self._read.result()


class Transports:
    """Every transport between the pools of a deployment; see `interfaces.Transport`.

    Args:
      transports: one a kind of link.
      workers: of the pools that lie on devices with a worker.

    Attributes:
      transports: the same.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        workers: Mapping[PoolId, DispatchWorker] | None = None,
    ) -> None:
        self.transports = list(transports)
        self._workers = dict(workers or {})
        self._jobs: dict[int, TransferFuture] = {}

    def connects(self, source: PoolId, target: PoolId) -> bool:
        return any(each.connects(source, target) for each in self.transports)

    def writes_ahead(self, source: PoolId, target: PoolId) -> bool:
        return self._between(source, target).writes_ahead(source, target)

    def _between(self, source: PoolId, target: PoolId) -> Transport:
        for each in self.transports:
            if each.connects(source, target):
                return each
        raise ValueError(f"source={source}, target={target}: no transport connects these pools")

    def expect(self, job: TransferJob) -> TransferFuture:
        """Register a job that leaves later: when the source's worker makes the future's call.

        Raises:
          ValueError: no transport connects its pools, or a job of its id is known.
        """
        if job.id in self._jobs:
            raise ValueError(f"job.id={job.id}: must differ from the ids of all jobs in flight")
        future = TransferFuture(job, self._between(job.source, job.target))
        self._jobs[job.id] = future
        return future

    def compile(self, job: TransferJob, target_pages: np.ndarray) -> Ticket[None]:
        return self._between(job.source, job.target).compile(job, target_pages)

    def send(self, job: TransferJob) -> TransferFuture:
        future = self.expect(job)
        try:
            return ask(self._workers.get(job.source), future)
        except BaseException:
            self.cancel(job.id)
            raise

    def write(self, job_id: int, target_pages: np.ndarray) -> Ticket[int]:
        sent = self._jobs.pop(job_id, None)
        if sent is None:
            raise ValueError(f"job_id={job_id}: must be a job in flight")
        future = DispatchFuture(partial(_write, sent, target_pages))
        try:
            return ask(self._workers.get(sent.job.target), future)
        except BaseException:
            sent.transport.cancel(job_id)
            raise

    def cancel(self, job_id: int) -> None:
        future = self._jobs.pop(job_id, None)
        if future is None:
            return
        if not future.give_up(CancelledJobError(f"job {job_id} was cancelled before it left")):
            future.transport.cancel(job_id)

    def measure(self, source: PoolId, target: PoolId, nbytes: int) -> Ticket[float]:
        return self._between(source, target).measure(source, target, nbytes)

    def close(self) -> None:
        for job_id in list(self._jobs):
            self.cancel(job_id)
        for each in self.transports:
            each.close()


def _write(sent: TransferFuture, target_pages: np.ndarray) -> Ticket[int]:
    """Let the job's transport write it. Raises what kept the job from leaving, if anything did. A
    job that cannot be written is forgotten all the same."""
    try:
        _ = sent.ticket
        return sent.transport.write(sent.job.id, target_pages)
    except BaseException:
        sent.transport.cancel(sent.job.id)
        raise
