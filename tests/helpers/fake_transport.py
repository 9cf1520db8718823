"""A transport between fake engines; see tests/helpers/fakes.py."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import NULL_PAGE
from pdjax.interfaces.transport import LostPages, TransferCost, TransferJob
from tests.helpers.fake_engines import FakeEngine
from tests.helpers.fakes import Chance, FakePool, FakeTicket


class FakeTransport:
    """Reads the source when it is asked to, as the contract says, and writes when it is told to;
    what is on the way may fail, be damaged, or never arrive."""

    def __init__(
        self,
        engines: Sequence[FakeEngine],
        chance: Chance,
        *,
        loss_rate: float = 0.0,
        damage_rate: float = 0.0,
        tiers: Sequence[FakePool] = (),
    ) -> None:
        self._pools: dict[PoolId, FakePool] = {engine.pool: engine.pages for engine in engines}
        self._tiers = {tier.id for tier in tiers}
        self._loses = {tier.id for tier in tiers[1:]}  # as disks do
        self._pools |= {tier.id: tier for tier in tiers}
        self._chance = chance
        self.loss_rate, self.damage_rate = loss_rate, damage_rate
        self.pages_moved = 0
        self.jobs: list[TransferJob] = []
        self.under_way: dict[int, FakeTransferTicket] = {}
        self.lost = self.damaged = 0
        for engine in engines:
            engine.transport = self

    def connects(self, source: PoolId, target: PoolId) -> bool:
        return source != target

    def writes_ahead(self, source: PoolId, target: PoolId) -> bool:
        """Nothing must wait for what never arrives."""
        return self.connects(source, target) and not self.loss_rate

    def compile(self, job: TransferJob, target_pages: np.ndarray) -> FakeTicket[None]:
        return FakeTicket(None, Chance(0))

    def send(self, job: TransferJob) -> "FakeTransferTicket":
        self._chance.maybe_fail("send")
        assert np.count_nonzero(job.source_pages != NULL_PAGE) == job.pages
        assert job.id not in self.under_way, "a job is sent once"
        self.jobs.append(job)
        self.pages_moved += job.pages
        lost = self._chance.random.random() < self.loss_rate
        damaged = self._chance.random.random() < self.damage_rate and job.checked
        self.lost, self.damaged = self.lost + lost, self.damaged + damaged
        pool = self._pools[job.source]
        ticket = FakeTransferTicket(pool, job, self._chance, lost=lost, damaged=damaged)
        if job.source in self._loses and self._chance.random.random() < self.loss_rate:
            ticket._error = LostPages((job.contents[-1].page,))
        self.under_way[job.id] = ticket
        return ticket

    def write(self, job_id: int, target_pages: np.ndarray) -> FakeTicket[int]:
        self._chance.maybe_fail("write")
        ticket = self.under_way.pop(job_id)
        job = ticket.job
        assert ticket.arrived is not None or self.writes_ahead(job.source, job.target), "not yet"
        pool = self._pools[job.target]
        slots = slots_of(target_pages, pool.layout.page_size)
        layers = slice(job.layers.start, job.layers.stop)
        if pool.id in self._tiers:  # it is not donated
            pool.contents[layers, slots] = ticket.copy
            self._chance.maybe_fail("write to a tier")
        else:
            with pool.donated(self._chance):
                pool.contents[layers, slots] = ticket.copy
        wanted = bool((target_pages != NULL_PAGE).any())
        return FakeTicket(int(ticket.damaged and job.checked and wanted), self._chance)

    def cancel(self, job_id: int) -> None:
        self.under_way.pop(job_id, None)

    def measure(self, source: PoolId, target: PoolId, nbytes: int) -> FakeTicket[float]:
        return FakeTicket(nbytes / 1e9, Chance(0))

    def close(self) -> None:
        """There is nothing to let go."""


class FakeTransferTicket(FakeTicket[TransferCost]):
    """Has its copy from the first; it arrives when it likes, or never."""

    def __init__(
        self, pool: FakePool, job: TransferJob, chance: Chance, *, lost: bool, damaged: bool
    ) -> None:
        share = len(job.layers) / pool.layout.num_layers
        nbytes = int(len(job.source_pages) * pool.layout.page_bytes * share)
        super().__init__(TransferCost(nbytes, job.pages, 1, 1, 0), chance)
        self.job, self.damaged, self._lost = job, damaged, lost
        slots = slots_of(job.source_pages, pool.layout.page_size)
        layers = slice(job.layers.start, job.layers.stop)
        self.copy = pool.contents[layers, slots] + int(damaged)
        self.arrived: np.ndarray | None = None
        self.read = _Read(self, chance)

    def ready(self) -> bool:
        if self._lost or not super().ready():
            return False
        self.arrived = self.copy
        return True

    def result(self) -> TransferCost:
        while not self.ready():
            assert not self._lost, "it will never arrive"
        return super().result()


@dataclass
class _Read:
    """Ready when the transfer has arrived, or some time before."""

    transfer: FakeTransferTicket
    chance: Chance

    def ready(self) -> bool:
        return self.transfer.arrived is not None or self.chance.random.random() < 0.5

    def result(self) -> None:
        return None


def slots_of(pages: np.ndarray, page_size: int) -> np.ndarray:
    """Addresses of whole pages."""
    return (pages[:, None].astype(np.int64) * page_size + np.arange(page_size)).ravel()
