"""How KV moves from one pool to another, as data and a protocol."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.interfaces.batches import Array
from pdjax.interfaces.tickets import Ticket


class KeptPage(NamedTuple):
    """A page whose content is known, by its key, and its place among the pages of its sequence."""

    key: bytes
    place: int
    page: int


class LostPages(RuntimeError):
    """Pages of the source of a job do not hold what they were said to: a disk has lost them.

    Attributes:
      pages: of the source.
    """

    def __init__(self, pages: tuple[int, ...]) -> None:
        super().__init__(f"pages {list(pages)} do not hold what they were said to")
        self.pages = pages


@dataclass(frozen=True)
class Pool:
    """A pool that no engine has: transports move pages into it and out of it, and nothing computes
    there.

    Attributes:
      id: its name, such as "host/0".
      layout: of its pages; it holds the same KV as the pools of engines.
      num_pages: null page included.
      kept: pages that hold KV since before the process began, the least recently used first.
    """

    id: PoolId
    layout: KVLayout
    num_pages: int
    kept: tuple[KeptPage, ...] = ()


@dataclass(frozen=True)
class TransferJob:
    """Pages of some layers, to be sent from one pool to another.

    On arrival they become target pages, which are named only when they are written. Both lists hold
    the same tokens in the same order, in spans of max(S, S') tokens, where S and S' are the page
    sizes of the two pools, of which one divides the other: span i is the i-th run of max(S, S')/S
    source pages, and of max(S, S')/S' target pages. Source pages that hold nothing of a sequence,
    at the end of a span or in whole spans of padding, are null.

    Attributes:
      id: unique among the jobs of a coordinator.
      source, target: the pools.
      layers: global layers.
      source_pages: i32[n].
      pages: how many of `source_pages` are not null.
      checked: whether a checksum of each page travels along, and is compared when it is written.
      contents: of the source's pages that are not null, in order, where their keys are known.
    """

    id: int
    source: PoolId
    target: PoolId
    layers: range
    source_pages: Array
    pages: int
    checked: bool = False
    contents: tuple[KeptPage, ...] = ()


@dataclass(frozen=True)
class TransferCost:
    """What a transfer job moved."""

    bytes: int  # over the wire, padding pages and checksums included
    pages: int  # of the source that are of a sequence; in all layers of the job together
    pieces: int  # single-device arrays
    puts: int  # batched device_put calls
    layout_changing_puts: int  # fell to the host; must be 0


class TransferTicket(Ticket[TransferCost], Protocol):
    """A transfer job in flight: ready once every piece has arrived on the receiving mesh."""

    @property
    def read(self) -> Ticket[None]:
        """Ready once the source's pages have been read."""
        ...


class Transport(Protocol):
    """Moves pages between pools over one kind of link, or over several."""

    def connects(self, source: PoolId, target: PoolId) -> bool:
        """Whether pages can be moved from one pool to the other, which differs from it."""
        ...

    def writes_ahead(self, source: PoolId, target: PoolId) -> bool:
        """Whether the devices of two connected pools wait for one another: a job between them may
        be written before it has arrived, and engines of the target fed by steps of the source's.
        If a job or step fails then, the target's pool may be lost."""
        ...

    def compile(self, job: TransferJob, target_pages: Array) -> Ticket[None]:
        """Compile what it takes to send such a job and to write it, if anything is compiled; see
        `Engine.compile`. Nothing moves."""
        ...

    def send(self, job: TransferJob) -> TransferTicket:
        """Begin to move pages; returns before the work that writes them has finished.

        The source's pages are read in the order of the calls: after everything that engines of its
        pool were asked before, and before everything that they are asked later. So the pages may be
        given to another sequence as soon as this returns. Nothing is written to the target's pool
        before `write`.
        """
        ...

    def write(self, job_id: int, target_pages: Array) -> Ticket[int]:
        """Write what has arrived into the target's pool, in order before everything that its
        engines are asked later. The job is forgotten.

        Args:
          job_id: of a job that has been sent, also as an export of a step, and has arrived, unless
            `writes_ahead` says that this need not be.
          target_pages: i32[m], m * S' == n * S; null for tokens that are not wanted any more.

        Raises:
          ValueError: the job is not known: it was not sent, or has been written or cancelled.

        Returns:
          ready when the pages have been written; the number of pages, over all devices, whose
          checksum is not that of the source; 0 where the job is not checked.
        """
        ...

    def cancel(self, job_id: int) -> None:
        """Forget a job that will not be written: it may have arrived, be under way or have failed.
        A job that has not left yet never leaves. A job that is not known is no error."""
        ...

    def measure(self, source: PoolId, target: PoolId, nbytes: int) -> Ticket[float]:
        """Seconds that one plain put of so many bytes takes, from one device of the source's mesh
        to one of the target's; what a hand-off's rate is held against."""
        ...

    def close(self) -> None:
        """Let go of what is kept on devices between jobs. Nothing is sent from then on; a second
        call does nothing."""
        ...
