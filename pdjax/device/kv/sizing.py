"""How many pages a pool gets where the config leaves it open."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from pdjax.kv_layout import KVLayout


class Device(Protocol):
    """What is asked of a `jax.Device`."""

    def memory_stats(self) -> dict[str, int] | None:
        """Bytes in use and allowed, on platforms that count them; None elsewhere."""
        ...


@dataclass(frozen=True)
class Room:
    """The memory of a mesh's devices, as the pages that it holds.

    Attributes:
      field: of the config that leaves the pool's size open, for messages.
      fraction: of the free memory that pages may take.
      layout: of the pool.
      context: longest sequence served, tokens.
    """

    field: str
    fraction: float
    layout: KVLayout
    context: int

    def limit(self, wanted: int, devices: Iterable[Device]) -> int:
        """`wanted` pages, or as many as fit into what is free now on each of `devices`.

        To be asked when the weights are in place.

        Raises:
          ValueError: not even one whole context fits.
        """
        known = [free for device in devices if (free := free_bytes(device)) is not None]
        if not known:
            return wanted
        fitting = int(min(known) * self.fraction) // self.layout.device_page_bytes
        least = 1 + self.layout.pages_for(self.context)
        if fitting < least:
            raise ValueError(
                f"{self.field}=None: {self.fraction} (kv.memory_fraction) of the "
                f"{min(known) / 1e9:.2f} GB that the weights leave free on a device hold {fitting} "
                f"pages of {self.layout.device_page_bytes / 1e6:.2f} MB; must be at least {least}, "
                f"the null page and one context of {self.context} tokens (model.max_model_len)"
            )
        return min(fitting, wanted)


def free_bytes(device: Device) -> int | None:
    """Bytes that may still be allocated; None where the platform does not say."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats or "bytes_in_use" not in stats:
        return None
    return max(0, stats["bytes_limit"] - stats["bytes_in_use"])
