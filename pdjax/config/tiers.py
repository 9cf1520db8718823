"""Tiers of memory below the pools of engines."""

from dataclasses import dataclass

from pdjax.config.checks import MOST_BYTES, between, check_types
from pdjax.core.messages import shown
from pdjax.core.numbers import is_number

GB = 10**9
"""Bytes of a gigabyte."""


@dataclass(frozen=True)
class TiersConfig:
    """Tiers take in the cached pages that engines' pools evict, and give them back to prompts that
    need them again; see `host/tiers/`. Whether a page is brought up or computed again is decided by
    `policies.tiering`.

    Attributes:
      host_gb: gigabytes (10^9 bytes) of host memory for a tier; None has none. Needs
        kv.prefix_cache. The system gives the memory page by page, as it is first written.
      disk_folder: directory of a file for a tier on a disk below the one in host memory; None has
        none. The file is this process's alone while it runs. What lies there is found by the next
        process with the same model, code and kind of device.
      disk_gb: gigabytes of that file, which are reserved at once; needed with disk_folder.
      bytes_in_flight: most bytes on the way to a tier at once, and as many from it; of pages that
        are evicted at once, those beyond it are not taken in.
    """

    host_gb: float | None = None
    disk_folder: str | None = None
    disk_gb: float | None = None
    bytes_in_flight: int = 256 << 20

    def __post_init__(self) -> None:
        check_types("tiers", self)
        between("tiers", self, 1, MOST_BYTES, "bytes_in_flight")
        for name in ("host_gb", "disk_gb"):
            size = getattr(self, name)
            if size is not None and not (is_number(size) and 0 < size <= MOST_BYTES / GB):
                raise ValueError(
                    f"tiers.{name}={shown(size)}: must be None or a number of gigabytes above 0"
                )
        folder = self.disk_folder
        if folder is not None and (folder == "" or "\0" in folder):
            raise ValueError(f"tiers.disk_folder={shown(folder)}: must be a directory or None")
        if (folder is None) != (self.disk_gb is None):
            raise ValueError(
                f"tiers.disk_gb={self.disk_gb}: needed with tiers.disk_folder, and only there; "
                f"tiers.disk_folder={shown(folder)}"
            )
        if folder is not None and self.host_gb is None:
            raise ValueError(
                f"tiers.disk_folder={shown(folder)}: needs tiers.host_gb, through which KV goes to "
                "the disk and comes from it"
            )

    @property
    def disk_bytes(self) -> int:
        """Bytes of the tier's file on a disk; 0 without one."""
        return 0 if self.disk_gb is None else int(self.disk_gb * GB)

    def host_pages(self, page_bytes: int) -> int:
        """Pages of the tier in host memory, null page included; 0 without one.

        Args:
          page_bytes: of one page, over all layers.

        Raises:
          ValueError: it holds no page.
        """
        if self.host_gb is None:
            return 0
        pages = int(self.host_gb * GB) // page_bytes
        if not pages:
            raise ValueError(
                f"tiers.host_gb={self.host_gb}: holds no page, of which one has {page_bytes} bytes"
            )
        return 1 + pages
