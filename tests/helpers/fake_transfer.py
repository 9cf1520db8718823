"""A transfer between fake engines; see tests/helpers/fakes.py."""

import numpy as np

from pdjax.core.kv_layout import NULL_PAGE
from pdjax.interfaces.transfer import End, Shipment, Side, TransferCost, TransferTicket
from tests.helpers.fakes import Chance, FakeDecodeEngine, FakePool, FakePrefillEngine, FakeTicket


class FakeTransfer:
    """Reads the source when it is asked to, as the contract says, and writes on landing; what is on
    the way may fail, be damaged, or never arrive."""

    def __init__(
        self,
        prefill: list[FakePrefillEngine],
        decode: list[FakeDecodeEngine],
        chance: Chance,
        *,
        colocated: bool = False,
        loss_rate: float = 0.0,
        damage_rate: float = 0.0,
    ) -> None:
        self._engines: dict[End, FakePrefillEngine | FakeDecodeEngine] = {}
        self._engines |= {End(Side.PREFILL, i): engine for i, engine in enumerate(prefill)}
        self._engines |= {End(Side.DECODE, i): engine for i, engine in enumerate(decode)}
        self._chance = chance
        self._colocated = colocated
        self.loss_rate, self.damage_rate = loss_rate, damage_rate
        self.pages_moved = 0
        self.shipments: list[Shipment] = []
        self.lost = self.damaged = 0
        if colocated:
            for source, target in zip(prefill, decode, strict=True):
                target.pool = source.pool

    def shares_pool(self, source: End, target: End) -> bool:
        return self._colocated and source.engine == target.engine

    def send(self, shipment: Shipment) -> "FakeTransferTicket":
        self._chance.maybe_fail("send")
        assert np.count_nonzero(shipment.source_pages != NULL_PAGE) == shipment.pages
        self.shipments.append(shipment)
        self.pages_moved += shipment.pages
        pool = self._engines[shipment.source].pool
        lost = self._chance.random.random() < self.loss_rate
        damaged = self._chance.random.random() < self.damage_rate
        self.lost, self.damaged = self.lost + lost, self.damaged + damaged
        return FakeTransferTicket(pool, shipment, self._chance, lost=lost, damaged=damaged)

    def land(self, ticket: TransferTicket, target_pages: np.ndarray) -> FakeTicket[int]:
        self._chance.maybe_fail("land")
        assert isinstance(ticket, FakeTransferTicket)
        assert ticket.arrived is not None, "nothing has arrived yet"
        shipment = ticket.shipment
        pool = self._engines[shipment.target].pool
        slots = slots_of(target_pages, pool.layout.page_size)
        layers = slice(shipment.layers.start, shipment.layers.stop)
        with pool.donated(self._chance):
            pool.contents[layers, slots] = ticket.arrived
        wanted = bool((target_pages != NULL_PAGE).any())
        return FakeTicket(int(ticket.damaged and shipment.checked and wanted), self._chance)

    def probe(self, source: End, target: End, nbytes: int) -> float:
        return nbytes / 1e9

    def close(self) -> None:
        """There is nothing to let go."""


class FakeTransferTicket(FakeTicket[TransferCost]):
    """Has its copy from the first; it arrives when it likes, or never."""

    def __init__(
        self, pool: FakePool, shipment: Shipment, chance: Chance, *, lost: bool, damaged: bool
    ) -> None:
        share = len(shipment.layers) / pool.layout.num_layers
        nbytes = int(len(shipment.source_pages) * pool.layout.page_bytes * share)
        super().__init__(TransferCost(nbytes, shipment.pages, 1, 1, 0), chance)
        self.shipment, self.damaged, self._lost = shipment, damaged, lost
        slots = slots_of(shipment.source_pages, pool.layout.page_size)
        layers = slice(shipment.layers.start, shipment.layers.stop)
        self._copy = pool.contents[layers, slots] + int(damaged)
        self.arrived: np.ndarray | None = None

    def gathered(self) -> bool:
        return self.arrived is not None or self._chance.random.random() < 0.5

    def ready(self) -> bool:
        if self._lost or not super().ready():
            return False
        self.arrived = self._copy
        return True

    def result(self) -> TransferCost:
        while not self.ready():
            assert not self._lost, "somebody waits for ever"
        return super().result()


def slots_of(pages: np.ndarray, page_size: int) -> np.ndarray:
    """Addresses of whole pages."""
    return (pages[:, None].astype(np.int64) * page_size + np.arange(page_size)).ravel()
