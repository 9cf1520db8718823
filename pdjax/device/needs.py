"""What the programs of an engine take on a device beside weights and pool, as XLA says it.

XLA plans the memory of a program while it compiles it, so that this is known before the program
runs, and before the pool is there: shapes of a pool are enough.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from pallas_kernels.quantised import Pages
from pdjax.core.kv_layout import KVLayout, KVPlane
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.programs.program import Program
from pdjax.interfaces.steps import Step


class PlannedPool(PoolOwner):
    """A pool of shapes alone. Programs over it can be compiled, and not called."""

    def _pages(self, plane: KVPlane) -> Pages:
        pages: Pages = jax.eval_shape(self._zero_pages(plane))
        return pages


def program_bytes(programs: Sequence[Program], steps: Iterable[Step]) -> int | None:
    """Compile what steps call. Returns the most bytes that one of these programs takes on a device
    beside its arguments: temporary ones, and results that are not written over arguments; None
    where the platform does not say. Programs of a device run one after another.
    """
    of_kind = {each.kind: each for each in programs}
    most = 0
    for step in steps:
        for program, arguments in of_kind[step.kind].calls(step):
            form: Any = program.form(arguments)
            found = form.memory_analysis()
            if found is None:
                return None
            own = found.output_size_in_bytes - found.alias_size_in_bytes
            most = max(most, found.temp_size_in_bytes + max(0, own))
    return most


def tier_bytes(layout: KVLayout, bound: int) -> int:
    """Bytes of KV on a device that go down to a tier or come up from it.

    Args:
      layout: of the pool.
      bound: tiers.bytes_in_flight, in either direction, over all devices.
    """
    return 2 * bound * layout.device_page_bytes // layout.page_bytes


def in_flight_bytes(layout: KVLayout, context: int, bound: int | None) -> int:
    """Bytes of KV on a device that hand-offs read out of its pool, or have yet to write to it.

    Args:
      layout: of the pool.
      context: longest sequence served, tokens.
      bound: handoff.max_bytes_in_flight, over all devices. None has no bound: then there is room
        for two of the longest sequences, and a burst of more waits for memory.
    """
    whole = layout.pages_for(context) * layout.device_page_bytes
    return 2 * whole if bound is None else min(bound, 2 * whole)
