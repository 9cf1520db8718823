"""What connects the pools of a deployment, and the tiers below them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from pdjax.config import Config
from pdjax.config.tiers import GB, TiersConfig
from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.device.devices import Workers
from pdjax.device.kv.disk_tier import DiskTransport
from pdjax.device.kv.host_memory import available_bytes
from pdjax.device.kv.host_pool import HostPool
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.tiers import HostTransport
from pdjax.device.kv.transport import DeviceTransport
from pdjax.device.kv.transports import Transports
from pdjax.disk.headers import Identity
from pdjax.disk.slot_file import SlotFile
from pdjax.disk.slot_store import SlotStore
from pdjax.interfaces.transport import Pool, Transport

DISK = PoolId("disk/0")
"""The tier on a disk."""


def connect(
    pools: Mapping[PoolId, PoolOwner],
    wire_dtype: str | None,
    workers: Workers,
    tiers: Iterable[Pool] = (),
    disk: SlotStore | None = None,
    *,
    hands_off: bool = True,
) -> Transports:
    """Every transport between the pools; of two that connect the same, the first is taken.

    Args:
      tiers: pools in host memory, which are made here.
      disk: the store of the pool DISK, below those tiers.
      hands_off: whether KV moves between the pools of engines.

    Raises:
      ValueError: two pools that cannot hold the same KV, or no such wire type.
    """
    transports: list[Transport] = []
    if hands_off:
        transports.append(DeviceTransport(pools, wire_dtype, workers.ahead))
    for tier in tiers:
        host = HostPool(tier)
        transports.append(beside := HostTransport(pools, host, workers.ahead))
        if disk is not None:
            transports.append(DiskTransport(host, DISK, disk, beside.copier))
    by_pool = {name: workers.of(pool.mesh.devices.flat) for name, pool in pools.items()}
    return Transports(
        transports, {name: worker for name, worker in by_pool.items() if worker is not None}
    )


def host_tiers(config: Config, layout: KVLayout) -> tuple[Pool, ...]:
    """The tier in host memory, if a config has one.

    Args:
      layout: of the prefill pools, whose page size and type the tier has.

    Raises:
      ValueError: the host has not so much memory, or no page fits.
    """
    whole = replace(layout, tp=1)
    pages = config.tiers.host_pages(whole.page_bytes)
    if not pages:
        return ()
    free = available_bytes()
    if free is not None and pages * whole.page_bytes > free:
        raise ValueError(
            f"tiers.host_gb={config.tiers.host_gb}: must be at most what the host has left, "
            f"{free / GB:.2f} GB"
        )
    return (Pool(PoolId("host/0"), whole, pages),)


def disk_store(tiers: TiersConfig, model: bytes, layout: KVLayout) -> SlotStore:
    """The store of the tier on a disk; whoever asks closes it.

    Args:
      tiers: have a folder for it.
      model: its fingerprint.
      layout: of the tier in host memory.

    Raises:
      ValueError: the folder or the size cannot be used.
    """
    assert tiers.disk_folder is not None, "there is a tier on a disk"
    identity = Identity.of(model, layout)
    try:
        file = SlotFile(tiers.disk_folder, identity, tiers.disk_bytes)
    except ValueError as error:
        field, _, reason = str(error).partition(": ")
        named = f"tiers.disk_{field}" if field.startswith("folder=") else None
        raise ValueError(f"{named or f'tiers.disk_gb={tiers.disk_gb}'}: {reason}") from error
    return SlotStore(file, most_bytes=4 * tiers.bytes_in_flight)
