"""Makes the meshes, and maps logical axes to mesh axes.

Both phases use a mesh of axes ("stage", "tp"); a prefill mesh has one stage. Each phase has a table
of rules: the mesh axes that shard each logical axis of a weight. No other file makes a mesh.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

STAGE = "stage"
TP = "tp"

HOST = "pinned_host"
"""The memory kind that devices write and the host reads."""

Rules = Mapping[str, tuple[str, ...]]

PREFILL_RULES: Rules = {
    "stage": (STAGE,),
    "kv_heads": (TP,),
    "mlp": (TP,),
    "experts": (),
    "expert_mlp": (TP,),
    "shared_mlp": (TP,),
    "vocab": (TP,),
}
"""Prefill: one stage; KV heads, MLP, each expert and the vocabulary are sharded over `tp`."""

DECODE_RULES: Rules = {**PREFILL_RULES, "vocab": (STAGE, TP)}
"""Decode: layers over `stage`; the vocabulary over all devices, so that the last stage is not a
bottleneck."""

WHOLE_EXPERTS: Rules = {"experts": (TP,), "expert_mlp": ()}
"""Rules in place of those of a phase: experts are dealt out to the shards, each of them whole."""


def make_mesh(devices: Sequence[jax.Device], stages: int, tp: int) -> Mesh:
    """Make a ("stage", "tp") mesh over exactly `stages * tp` devices, stage-major.

    Raises:
      ValueError: `devices` has another length.
    """
    if len(devices) != stages * tp:
        raise ValueError(
            f"devices: {len(devices)} given, but stages={stages} x tp={tp} needs {stages * tp}"
        )
    grid = np.array(devices, dtype=object).reshape(stages, tp)
    return Mesh(grid, (STAGE, TP), axis_types=(AxisType.Auto, AxisType.Auto))


class Device(Protocol):
    """The part of `jax.Device` that says what a device is and has."""

    @property
    def platform(self) -> str:
        """The platform's name, such as "cpu"."""
        ...

    def memory_stats(self) -> dict[str, int] | None:
        """Return bytes in use and allowed, on platforms that count them; None elsewhere."""
        ...


DeviceT = TypeVar("DeviceT", bound=Device)


def take_devices(wanted: Sequence[int], what: Sequence[str]) -> list[list[jax.Device]]:
    """`share_out` the process's devices."""
    return share_out(wanted, what, jax.devices())


def share_out(
    wanted: Sequence[int], what: Sequence[str], devices: Sequence[DeviceT]
) -> list[list[DeviceT]]:
    """Deal devices, in order, to meshes of `wanted[i]` of them each.

    Raises:
      ValueError: there are not enough; the message lists `what[i]` with its `wanted[i]`.
    """
    if sum(wanted) > len(devices):
        needs = ", ".join(f"{name} {count}" for name, count in zip(what, wanted, strict=True))
        virtual = (
            "; virtual devices are made once, when JAX starts: give the first LLM of the process "
            f"cpu_devices={sum(wanted)}"
        )
        raise ValueError(
            f"devices: {needs} make {sum(wanted)}, but this process has {len(devices)} "
            f"({devices[0].platform}); lower prefill.engines, prefill.tp, decode.engines, "
            "decode.stages or decode.tp, or take one mesh by colocated=True, as the preset "
            f"smollm2_colocated does{virtual if devices[0].platform == 'cpu' else ''}"
        )
    dealt, first = [], 0
    for count in wanted:
        dealt.append(list(devices[first : first + count]))
        first += count
    return dealt


def partition(rules: Rules, axes: Sequence[str | None], *, stacked: bool = False) -> PartitionSpec:
    """Return the PartitionSpec of an array with logical `axes`.

    A `stacked` array holds one local array a stage, concatenated along axis 0, so `stage` becomes
    the major part of axis 0. A shard then has the shape that a one-stage mesh would give it.
    """
    parts: list[tuple[str, ...]] = [rules[axis] if axis else () for axis in axes]
    if stacked:
        parts[0] = rules["stage"] + parts[0]
    return PartitionSpec(*(part if len(part) > 1 else part[0] if part else None for part in parts))


def sharding(
    mesh: Mesh | AbstractMesh, rules: Rules, axes: Sequence[str | None], *, stacked: bool = False
) -> NamedSharding:
    """Return the NamedSharding of an array with logical `axes` on `mesh`; see `partition`."""
    return NamedSharding(mesh, partition(rules, axes, stacked=stacked))


def shardings(mesh: Mesh, specs: Any, memory: str | None = None) -> Any:
    """Turn a tree of PartitionSpecs into NamedShardings on `mesh`.

    `memory` is the memory kind; None takes the devices' default.
    """
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec, memory_kind=memory),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )
