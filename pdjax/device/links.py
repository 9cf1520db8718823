"""What connects the pools of a deployment, and the tiers below them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from pdjax.config import Config
from pdjax.config.tiers import GB
from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.device.devices import Workers
from pdjax.device.kv.host_memory import available_bytes
from pdjax.device.kv.host_pool import HostPool
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.tiers import HostTransport
from pdjax.device.kv.transport import DeviceTransport
from pdjax.device.kv.transports import Transports
from pdjax.interfaces.transport import Pool, Transport


def connect(
    pools: Mapping[PoolId, PoolOwner],
    wire_dtype: str | None,
    workers: Workers,
    tiers: Iterable[Pool] = (),
    *,
    hands_off: bool = True,
) -> Transports:
    """Every transport between the pools; of two that connect the same, the first is taken.

    Args:
      tiers: pools in host memory, which are made here.
      hands_off: whether KV moves between the pools of engines.

    Raises:
      ValueError: two pools that cannot hold the same KV, or no such wire type.
    """
    transports: list[Transport] = []
    if hands_off:
        transports.append(DeviceTransport(pools, wire_dtype, workers.ahead))
    transports += [HostTransport(pools, HostPool(tier), workers.ahead) for tier in tiers]
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
