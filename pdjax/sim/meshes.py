"""The time of simulated devices."""

from collections import deque

from pdjax.core.clock import VirtualClock
from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.sim.tickets import SimTicket


class MeshLost(RuntimeError):
    """A simulated mesh has lost what it kept on its devices."""


class SimMesh:
    """The devices that keep a pool. What they are asked runs in order, one piece of work at a time.

    Engines that share a pool are on the same mesh: the work of one delays that of the other.

    Args:
      clock: tells the time, and is moved by those who wait.
      pool, layout, num_pages: the pool that is kept here; `num_pages` counts the null page.

    Attributes:
      free: when everything that has been asked so far will have been done, seconds on the clock.
      busy: seconds of work that have been asked for so far.
      losses: how often everything kept here has been lost.
    """

    def __init__(self, clock: VirtualClock, pool: PoolId, layout: KVLayout, num_pages: int) -> None:
        self.clock = clock
        self.pool, self.layout, self.num_pages = pool, layout, num_pages
        self.free, self.busy = 0.0, 0.0
        self.losses = 0
        self._in_flight: deque[SimTicket] = deque()

    def take(self, seconds: float) -> float:
        """Work for so long, after everything that has been asked before; returns when it ends."""
        self.free = max(self.free, self.clock.now()) + seconds
        self.busy += seconds
        return self.free

    def wait_for(self, moment: float) -> None:
        """Do nothing that is asked from now on before a moment."""
        self.free = max(self.free, moment)

    def promise(self, ticket: SimTicket) -> None:
        """Count a ticket among the work in flight, which ends in an error if the mesh is lost
        before. Tickets come in the order of their moments."""
        while self._in_flight and self._in_flight[0].ready():
            self._in_flight.popleft()
        self._in_flight.append(ticket)

    def lose(self) -> None:
        """Lose everything that is kept here, as a step that fails loses the pool that was donated
        to it. What is in flight ends in a `MeshLost`, each piece of work at its moment; what is
        asked from now on finds an empty pool."""
        self.losses += 1
        error = MeshLost(f"{self.pool}: lost at {self.clock.now():.6f} s")
        for ticket in self._in_flight:
            ticket.fail(error)
        self._in_flight.clear()
