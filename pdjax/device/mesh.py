"""The meshes, and where a logical axis lives on them.

Both phases use a mesh of axes ("stage", "tp"); a prefill mesh has one stage. One rule table a phase
says on which mesh axes each logical axis of a weight lies. Nobody else makes a mesh.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

STAGE = "stage"
TP = "tp"

HOST = "pinned_host"
"""The kind of memory that devices write to and the host reads."""

Rules = Mapping[str, tuple[str, ...]]

PREFILL_RULES: Rules = {"stage": (STAGE,), "kv_heads": (TP,), "mlp": (TP,), "vocab": (TP,)}
"""Prefill: one stage, everything wide is sharded over `tp`."""

DECODE_RULES: Rules = {"stage": (STAGE,), "kv_heads": (TP,), "mlp": (TP,), "vocab": (STAGE, TP)}
"""Decode: layers over `stage`; the vocabulary over all devices, so that the last stage is no
bottleneck."""


def make_mesh(devices: Sequence[jax.Device], stages: int, tp: int) -> Mesh:
    """A ("stage", "tp") mesh over exactly `stages * tp` devices, stage-major."""
    if len(devices) != stages * tp:
        raise ValueError(
            f"devices: {len(devices)} given, but stages={stages} x tp={tp} needs {stages * tp}"
        )
    grid = np.array(devices, dtype=object).reshape(stages, tp)
    return Mesh(grid, (STAGE, TP), axis_types=(AxisType.Auto, AxisType.Auto))


def take_devices(wanted: Sequence[int], what: Sequence[str]) -> list[list[jax.Device]]:
    """Deal the process's devices out, in order, to meshes of `wanted[i]` devices each.

    Raises:
      ValueError: there are not enough devices; the message lists who wants how many.
    """
    devices = jax.devices()
    if sum(wanted) > len(devices):
        needs = ", ".join(f"{name} {count}" for name, count in zip(what, wanted, strict=True))
        raise ValueError(
            f"devices: {needs} make {sum(wanted)}, but this process has {len(devices)} "
            f"({devices[0].platform}); ask for fewer engines, stages or tp, or, on the CPU, for "
            "more cpu_devices before JAX starts"
        )
    dealt, first = [], 0
    for count in wanted:
        dealt.append(list(devices[first : first + count]))
        first += count
    return dealt


def partition(rules: Rules, axes: Sequence[str | None], *, stacked: bool = False) -> PartitionSpec:
    """PartitionSpec of an array with logical `axes`.

    `stacked` arrays hold one local array a stage, concatenated along axis 0 (so a shard has the
    very shape that a one-stage mesh would give it): `stage` becomes the major part of axis 0.
    """
    parts: list[tuple[str, ...]] = [rules[axis] if axis else () for axis in axes]
    if stacked:
        parts[0] = rules["stage"] + parts[0]
    return PartitionSpec(*(part if len(part) > 1 else part[0] if part else None for part in parts))


def sharding(
    mesh: Mesh, rules: Rules, axes: Sequence[str | None], *, stacked: bool = False
) -> NamedSharding:
    """NamedSharding of an array with logical `axes` on `mesh`; see `partition`."""
    return NamedSharding(mesh, partition(rules, axes, stacked=stacked))


def shardings(mesh: Mesh, specs: Any, memory: str | None = None) -> Any:
    """A tree of PartitionSpecs as NamedShardings on `mesh`, in its devices' memory of the kind
    `memory`, their own unless given."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec, memory_kind=memory),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )
