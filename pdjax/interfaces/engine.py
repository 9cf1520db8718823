"""The door between the host column and an engine: what the host may ask of a mesh.

Everything that goes through it is plain data: dataclasses of numbers and numpy arrays that can be
pickled. Arrays are *fresh*: an array handed over is never written again, since a device may read it
after the call has returned. Every call returns at once; work in flight is a Ticket. What goes wrong
is raised by the call, or by its ticket's `result`.

There are four kinds of engine behind this protocol: real ones (`device/engine.py`), simulated ones
(`sim/`), fakes in the tests whose answers can be worked out by hand, and proxies of engines in
other processes.
"""

from collections.abc import Mapping
from typing import Protocol

from pdjax.core.ids import EngineId, PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.interfaces.batches import Array, Sampled
from pdjax.interfaces.steps import Step, StepKind
from pdjax.interfaces.tickets import Ticket
from pdjax.interfaces.transport import TransferTicket


class StepTicket(Ticket[Sampled], Protocol):
    """A step in flight: ready once its tokens have been chosen."""

    @property
    def made(self) -> bool:
        """Whether it has been dispatched, its exports too, or has failed before: whatever waits for
        it then does not wait for the host."""
        ...

    @property
    def exports(self) -> Mapping[int, TransferTicket]:
        """The transfers of the step by their jobs' ids, all of them from the start."""
        ...


class Engine(Protocol):
    """Owner of a mesh: parameters, compiled steps, and a part in a pool of pages.

    Everything that an engine is asked, and everything that a transport reads from its pool or
    writes to it, takes effect in the order of the calls.

    Attributes:
      id: its name.
      pool: the pool that keeps its pages; engines that name the same pool share it.
      layout: of the pool's pages.
      num_pages: of the pool, null page included.
      rows: decode rows over all microbatches; 0 where it accepts no decode step.
      layer_groups: global layers that a prefill step computes in one go, in order; all of them
        together are the model's.
      accepts: the steps that it may be given. A role is data: it may change while nothing is in
        flight.
    """

    id: EngineId
    pool: PoolId
    layout: KVLayout
    num_pages: int
    rows: int
    layer_groups: tuple[range, ...]
    accepts: frozenset[StepKind]

    @property
    def losses(self) -> int:
        """How often the engine has lost what it keeps on its devices, all pages of its pool
        included, and has started again with an empty pool.

        A call or a ticket that fails may have lost it: a step donates its pool. The count is up
        before that error can be seen, and before anything that was computed from the empty pool
        can be.
        """
        ...

    def compile(self, step: Step) -> Ticket[None]:
        """Compile what a step of these shapes needs, if anything is compiled. Nothing runs, and
        what the step says beside its shapes does not matter; a step of nothing but padding stands
        for all of its shapes. Ready, as far as it can be, in the order of the calls."""
        ...

    def submit(self, step: Step) -> StepTicket:
        """Dispatch a step of a kind that is accepted. The ticket holds the tokens chosen: of a
        prefill step a row a sequence, of a tick those of the microbatch that leaves."""
        ...

    def set_history(self, row: int, token_ids: Array) -> None:
        """Set the history of a decode row (0 <= row < rows) to token_ids i32[C], for its penalties.

        Called before a penalized sequence's first tick in a row; from then on the device appends
        what it samples. A tick in which the row is idle leaves its history as it is.
        """
        ...

    def feed(self, row: int, step: StepTicket, index: int) -> None:
        """Let the next input of a decode row be the token that `step` chooses for its `index`-th
        sequence, which the host need not know. The step has been `made`, by an engine of a pool
        from which the transport writes ahead. Where it chooses none, the row's tokens mean nothing.

        Called before the row's tick, and after all those before it.
        """
        ...

    def close(self) -> None:
        """Let go of the memory on the devices, after what has been asked. Nothing is asked of the
        engine from then on; a second call does nothing."""
        ...
