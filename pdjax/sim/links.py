"""Simulated links between pools."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pdjax.core.clock import VirtualClock
from pdjax.core.ids import PoolId
from pdjax.interfaces.batches import Array
from pdjax.interfaces.transport import TransferCost, TransferJob
from pdjax.sim.meshes import SimMesh
from pdjax.sim.tickets import SimTicket


@dataclass(frozen=True)
class Link:
    """What a link can do: one transfer at a time takes `latency + nbytes / bandwidth` seconds.

    Attributes:
      bandwidth: bytes a second.
      latency: seconds.

    Raises:
      ValueError: a bandwidth that is not positive, or a negative latency.
    """

    bandwidth: float = 300e9
    latency: float = 10e-6

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth={self.bandwidth}: must be more than 0 bytes a second")
        if not self.latency >= 0:
            raise ValueError(f"latency={self.latency}: must be a number of seconds, 0 or more")

    def seconds(self, nbytes: int) -> float:
        """Of a transfer that has the link for itself."""
        return self.latency + nbytes / self.bandwidth


class SimTransferTicket(SimTicket[TransferCost]):
    """A transfer job on its way.

    Attributes:
      read: ready once the source's pages have been read.
    """

    __slots__ = ("read",)

    def __init__(
        self, clock: VirtualClock, moment: float, cost: TransferCost, read: SimTicket[None]
    ) -> None:
        super().__init__(clock, moment, cost)
        self.read = read

    def fail(self, error: Exception) -> None:
        """Let the job fail at its moment, unless the source's pages have been read already."""
        if not self.read.ready():
            super().fail(error)
            self.read.fail(error)


@dataclass
class _Wire:
    """One direction between two pools, and when it will have carried what has been sent."""

    link: Link
    free: float = field(default=0.0)


class SimTransport:
    """Moves pages between the pools of meshes, each ordered pair of which has a link of its own.

    A transfer reads the source's pages when the source's mesh has done what it was asked before,
    and then waits for its link: the pages wait in a buffer meanwhile, as those of a real transfer
    do, and hold up no mesh. Pages travel as they lie in the source's pool.

    Args:
      clock: of the meshes.
      meshes: whose pools are connected.
      write_seconds: that the writing of a job takes on the target's mesh.
      link: what links can do; None connects only the pairs of `links`.
      links: (source, target) -> what the link between these two can do instead.

    Raises:
      ValueError: two meshes keep the same pool.
    """

    def __init__(
        self,
        clock: VirtualClock,
        meshes: Iterable[SimMesh],
        *,
        write_seconds: float = 50e-6,
        link: Link | None = Link(),
        links: Mapping[tuple[PoolId, PoolId], Link] | None = None,
    ) -> None:
        self._clock, self._write_seconds = clock, write_seconds
        self._meshes: dict[PoolId, SimMesh] = {}
        for mesh in meshes:
            if mesh.pool in self._meshes:
                raise ValueError(f"meshes: two of them keep the pool {mesh.pool}; one must")
            self._meshes[mesh.pool] = mesh
        self._link, self._links = link, dict(links or {})
        self._wires: dict[tuple[PoolId, PoolId], _Wire] = {}
        self._sent: dict[int, tuple[TransferJob, SimTransferTicket]] = {}

    def connects(self, source: PoolId, target: PoolId) -> bool:
        known = source != target and source in self._meshes and target in self._meshes
        return known and (self._link is not None or (source, target) in self._links)

    def writes_ahead(self, source: PoolId, target: PoolId) -> bool:
        return self.connects(source, target)

    def compile(self, job: TransferJob, target_pages: Array) -> SimTicket[None]:
        """There is nothing to compile."""
        return SimTicket(self._clock, self._clock.now(), None)

    def send(self, job: TransferJob) -> SimTransferTicket:
        if job.id in self._sent:
            raise ValueError(f"id={job.id}: a transfer job of this id is on its way already")
        wire, source = self._wire(job.source, job.target), self._meshes[job.source]
        layers, layout = len(job.layers), source.layout
        nbytes = len(job.source_pages) * layout.page_bytes * layers // layout.num_layers
        cost = TransferCost(nbytes, job.pages, 1, 1, 0)
        read = SimTicket(self._clock, source.take(0.0), None)
        ticket = SimTransferTicket(self._clock, self._carry(wire, read.moment, nbytes), cost, read)
        source.promise(ticket)
        self._sent[job.id] = job, ticket
        return ticket

    def write(self, job_id: int, target_pages: Array) -> SimTicket[int]:
        if job_id not in self._sent:
            raise ValueError(f"job_id={job_id}: no transfer job of this id has been sent")
        job, sent = self._sent[job_id]
        source, target = self._meshes[job.source], self._meshes[job.target]
        have = len(job.source_pages) * source.layout.page_size
        room = len(target_pages) * target.layout.page_size
        if have != room:
            raise ValueError(
                f"target_pages: hold {room} tokens, but job {job_id} brings {have}; must be equal"
            )
        del self._sent[job_id]
        if sent.ready():
            sent.result()  # raises what the job has failed with
        target.wait_for(sent.moment)
        ticket = SimTicket(self._clock, target.take(self._write_seconds), 0)
        target.promise(ticket)
        return ticket

    def cancel(self, job_id: int) -> None:
        """The link carries the rest of the job all the same."""
        self._sent.pop(job_id, None)

    def measure(self, source: PoolId, target: PoolId, nbytes: int) -> SimTicket[float]:
        wire = self._wire(source, target)
        end = self._carry(wire, self._clock.now(), nbytes)
        return SimTicket(self._clock, end, wire.link.seconds(nbytes))

    def close(self) -> None:
        self._sent.clear()

    def _wire(self, source: PoolId, target: PoolId) -> _Wire:
        wire = self._wires.get((source, target))
        if wire is None:
            if not self.connects(source, target):
                raise ValueError(f"source={source}, target={target}: no link connects them")
            link = self._links.get((source, target), self._link)
            assert link is not None, "connects says so"
            wire = self._wires[source, target] = _Wire(link)
        return wire

    def _carry(self, wire: _Wire, ready: float, nbytes: int) -> float:
        """Occupy a link for a transfer whose bytes are there at `ready`; returns when it ends."""
        wire.free = max(wire.free, ready, self._clock.now()) + wire.link.seconds(nbytes)
        return wire.free
