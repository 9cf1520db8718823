"""copy_step: pages of a pool are copied to others, in place, before a step computes what follows in
the copies."""

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pdjax.core.kv_layout import NULL_PAGE, Planes
from pdjax.device.kept.program import KeptProgram
from pdjax.device.kv.pool import KVPool, PoolOwner, page_specs
from pdjax.device.mesh import shardings
from pdjax.device.sharing import shared
from pdjax.interfaces.steps import Copies


def make_copy_step(pool: PoolOwner) -> KeptProgram:
    """(pool DONATED, pages i32[2, n]) -> pool, in which page `pages[1, i]` has the content of page
    `pages[0, i]`. All are read before any is written. Equal pools give the same program."""
    return _make(pool.mesh, pool.layout.slot_planes, tuple(sorted(pool.rules.items())))


@shared
def _make(
    mesh: Mesh, slot_planes: tuple[Planes, ...], rules: tuple[tuple[str, tuple[str, ...]], ...]
) -> KeptProgram:
    specs = page_specs(slot_planes, dict(rules))

    def copy(pool: KVPool, pages: jax.Array) -> KVPool:
        copied: KVPool = jax.tree.map(lambda x: x.at[:, pages[1]].set(x[:, pages[0]]), pool)
        return copied

    ins = specs, P()
    mapped = jax.shard_map(copy, mesh=mesh, in_specs=ins, out_specs=specs, check_vma=False)
    jitted = jax.jit(
        mapped,
        donate_argnums=0,
        in_shardings=shardings(mesh, ins),
        out_shardings=shardings(mesh, specs),
    )
    return KeptProgram("copy pages", jitted, mesh, slot_planes, rules)


def pack(copies: Copies, rows: int) -> np.ndarray:
    """i32[2, rows]: pages, and those that they are copied to; the null page is padding.

    Raises:
      ValueError: more copies than rows.
    """
    if len(copies) > rows:
        raise ValueError(f"copies: {len(copies)} given; must be at most the batch's {rows} rows")
    pages = np.full((2, rows), NULL_PAGE, np.int32)
    if copies:
        pages[:, : len(copies)] = np.array(copies, np.int32).T
    return pages
