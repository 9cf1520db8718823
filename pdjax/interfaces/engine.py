"""The door between the host column and the device column: what the host may ask of a mesh, as types
and protocols.

Everything that goes through it is numpy, and *fresh*: an array handed over is never written again,
since a device may read it after the call has returned. Every call returns at once; work in flight
is a Ticket. What goes wrong is raised by the call, or by its ticket's `result`.

There are three kinds of engine behind these protocols: real ones (`device/engine.py`), fake ones in
the tests, whose answers can be worked out by hand, and simulated ones.
"""

from collections.abc import Callable
from typing import Protocol

from pdjax.core.kv_layout import KVLayout
from pdjax.interfaces.batches import Array, DecodeBatch, PrefillBatch, Sampled
from pdjax.interfaces.tickets import Ticket


class PrefillEngine(Protocol):
    """Owner of a prefill mesh: parameters, pool of pages, compiled steps."""

    layout: KVLayout
    num_pages: int  # null page included
    layer_groups: tuple[range, ...]
    """Global layers that a step computes in one go, in order; all of them together are the
    model's."""

    @property
    def losses(self) -> int:
        """How often the engine has lost what it keeps on its devices, all pages of its pool
        included, and begun anew with an empty pool.

        A call or a ticket that fails may have lost it: a step donates its pool. The count is up
        before that error can be seen, and before anything that was computed from the empty pool
        can be.
        """
        ...

    def prefill(
        self, batch: PrefillBatch, after_group: Callable[[int], None] | None = None
    ) -> Ticket[Sampled]:
        """Dispatch one packed step. Steps run in the order of the calls.

        Args:
          after_group: called with g when `layer_groups[g]` has been dispatched, or will be before
            anything that is asked from then on, and before the next group is: what a Transfer is
            asked to send then has the KV that the group writes, and leaves while the next group is
            computed. It must not raise.
        """
        ...

    def close(self) -> None:
        """Let go of the memory on the devices. Nothing is asked of the engine from then on; a
        second call does nothing."""
        ...


class DecodeEngine(Protocol):
    """Owner of a decode mesh. Everything it is asked runs in the order of the calls."""

    layout: KVLayout
    num_pages: int  # null page included

    @property
    def losses(self) -> int:
        """See `PrefillEngine.losses`."""
        ...

    def tick(self, batch: DecodeBatch) -> Ticket[Sampled]:
        """Dispatch one tick; the ticket holds the tokens of the microbatch that leaves."""
        ...

    def remember(self, row: int, token_ids: Array) -> None:
        """Set the history of `row` (0 <= row < R * b; microbatch row // b) to token_ids i32[C], for
        its penalties.

        Called before a penalized sequence's first tick in a row; from then on the device appends
        what it samples.
        """
        ...

    def close(self) -> None:
        """See `PrefillEngine.close`."""
        ...
