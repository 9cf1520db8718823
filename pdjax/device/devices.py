"""Which devices each engine of a config has, and which of them have a worker that dispatches."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import jax

from pallas_kernels.paged_attention.api import PLATFORMS
from pdjax.config import Config
from pdjax.device.compat import use_virtual_cpu_devices
from pdjax.device.compilation_cache import use_compilation_cache
from pdjax.device.kept.ahead import Ahead
from pdjax.device.mesh import DeviceT, share_out
from pdjax.device.worker import DispatchWorker

_LOG = logging.getLogger("pdjax")

Dealt = list[list[jax.Device]]
"""The devices of each engine of a kind."""


def settled(config: Config) -> Config:
    """A config that says whether it is colocated: where it leaves that open, it is so if this
    process has too few devices for engines of their own, which a warning says. Starts JAX."""
    if config.colocated is not None:
        return config
    apart = replace(config, colocated=False)
    start_jax(apart)
    present = len(jax.devices())
    if present >= apart.devices:
        return apart
    try:
        instead = replace(config, colocated=True, handoff=config.handoff.where_nothing_moves)
    except ValueError:
        return apart  # which asks for more devices than there are, and will be told so
    if present < instead.devices:
        return apart
    _LOG.warning(
        "colocated: prefill and decode share one mesh, as in the preset smollm2_colocated, since "
        "meshes of their own need %d devices, and this process has %d",
        apart.devices,
        present,
    )
    return instead


def start_jax(config: Config) -> None:
    """Start JAX, with as many devices as a config needs where it may make them."""
    use_compilation_cache(config.compilation_cache)
    use_virtual_cpu_devices(config.cpu_devices or config.devices)


def deal_devices(config: Config) -> tuple[Dealt, Dealt]:
    """Those of the prefill engines and of the decode engines; of a colocated config, twice the
    same. Starts JAX, and needs no model.

    Raises:
      ValueError: there are too few, or decode attention that does not run on them.
    """
    start_jax(config)
    _check_attention(config.decode.attention, jax.default_backend())
    return dealt(config, jax.devices())


def dealt(
    config: Config, devices: Sequence[DeviceT]
) -> tuple[list[list[DeviceT]], list[list[DeviceT]]]:
    """The devices of the prefill engines and of the decode engines, out of these; of a colocated
    config, twice the same.

    Raises:
      ValueError: there are too few.
    """
    p, d = config.prefill, config.decode
    if config.colocated:
        replicas = [f"replica {i}" for i in range(p.engines)]
        names = replicas if p.engines > 1 else ["one engine"]
        shared = share_out([p.tp] * p.engines, names, devices)
        return shared, shared
    sizes = [p.tp] * p.engines, [d.stages * d.tp] * d.engines
    sources = [f"prefill engine {i}" for i in range(p.engines)]
    targets = [f"decode engine {i}" for i in range(d.engines)]
    if config.shared_devices:
        for_prefill = share_out(sizes[0], sources, devices)
        return for_prefill, share_out(sizes[1], targets, devices)
    apart = share_out([*sizes[0], *sizes[1]], [*sources, *targets], devices)
    return apart[: p.engines], apart[p.engines :]


def _check_attention(name: str | None, platform: str) -> None:
    here = [each for each, platforms in PLATFORMS.items() if platform in platforms]
    if name is not None and name not in here:
        raise ValueError(
            f"decode.attention={name!r}: on this platform, {platform}, allowed are None and "
            f"{', '.join(here)}"
        )


class Workers:
    """The threads of a deployment: workers that dispatch, one a set of devices that prefills, and
    what compiles. Other devices have no worker. A config allows them only where the sets do not
    overlap.

    Args:
      config: of the deployment.
      for_prefill: devices of each prefill engine.

    Attributes:
      ahead: compiles for all engines.
    """

    def __init__(self, config: Config, for_prefill: Dealt) -> None:
        sets = {frozenset(devices) for devices in for_prefill} if _has_workers(config) else set()
        self._of = {devices: DispatchWorker() for devices in sets}
        self.ahead = Ahead()

    def of(self, devices: Iterable[jax.Device]) -> DispatchWorker | None:
        """The worker of a set of devices, or None."""
        return self._of.get(frozenset(devices))


def _has_workers(config: Config) -> bool:
    """Whether workers dispatch to the devices that prefill."""
    asked = config.prefill.dispatch_thread
    if asked is not None:
        return asked
    shared = config.colocated or config.shared_devices
    return not shared and jax.default_backend() != "cpu"
