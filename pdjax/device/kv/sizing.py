"""Divides the free memory into pages for each pool."""

from collections.abc import Sequence
from dataclasses import dataclass

from pdjax.config import USUAL_FRACTION
from pdjax.core.kv_layout import KVLayout
from pdjax.device.kv.host_memory import available_bytes
from pdjax.device.mesh import Device

SLACK = 0.02
"""Of the free memory, which stays free where that is known: for small arrays that come and go, and
for what the allocator cannot join."""


@dataclass(frozen=True)
class Claim:
    """What a pool that is to be made needs.

    The config leaves the size of an open pool to `deal_pages`.

    Attributes:
      field: name of the config's field for the pool's pages.
      fixed: whether that field sets the size; False for an open pool.
      pages: pages of the pool; most pages of an open one.
      layout: KV layout of the pool.
      context: longest sequence served, tokens.
      devices: devices of the pool's mesh.
      part: of an open pool, a field that fixes the size of a part of it, and that part's pages.
      needs: bytes that the programs of its engines take on each device beside weights and pool;
        None where that is not known.
    """

    field: str
    fixed: bool
    pages: int
    layout: KVLayout
    context: int
    devices: Sequence[Device]
    part: tuple[str, int] = ("", 0)
    needs: int | None = None

    @property
    def least(self) -> int:
        """Pages of the null page, the fixed part and one whole context; at most `pages`."""
        return min(self.pages, 1 + self.part[1] + self.layout.pages_for(self.context))


@dataclass
class _Memory:
    """A memory, its free bytes, and the pools that claim some of it.

    Open pools may take `share` x kv.memory_fraction of the free bytes. `share` is one half for the
    host's memory, which other programs use, too.
    """

    name: str
    free: int
    share: float
    claims: list[tuple[int, int]]  # index of a claim, bytes of one of its pages in this memory
    needs: int | None = 0  # of the programs over all these pools; None where that is not known

    def need(self, more: int | None) -> None:
        """Programs of one more pool run here."""
        self.needs = None if self.needs is None or more is None else self.needs + more

    def budget(self, fraction: float | None) -> int:
        if fraction is None and self.needs is not None:
            return int(self.free * self.share * (1 - SLACK)) - self.needs
        return int(self.free * self.share * (USUAL_FRACTION if fraction is None else fraction))

    def says(self, fraction: float | None) -> str:
        """What the budget is, for a message."""
        if fraction is None and self.needs is not None:
            return f"all but {self.needs / 1e9:.2f} GB, which programs take, and {SLACK:.0%}"
        return f"{USUAL_FRACTION if fraction is None else fraction} (kv.memory_fraction)"


def deal_pages(claims: Sequence[Claim], fraction: float | None) -> list[int]:
    """Choose the pages of each pool from the memory that is free now; call it once the weights are
    loaded.

    Each open pool first gets its `least` pages. The rest of the budget is divided in proportion to
    the further pages that the open pools could use.

    Args:
      claims: the claims of all pools of a run.
      fraction: kv.memory_fraction, the part of the free memory for open pools, in (0, 1]. None
        leaves what the claims need and `SLACK`; where they do not say, it is `USUAL_FRACTION`.

    Raises:
      ValueError: the pools of fixed size do not fit, or the open ones cannot hold one context each.
    """
    pages = [claim.pages for claim in claims]
    for memory in _memories(claims):
        fixed = [(claims[i], each) for i, each in memory.claims if claims[i].fixed]
        open_ = [(i, each) for i, each in memory.claims if not claims[i].fixed]
        taken = sum(claim.pages * each for claim, each in fixed)
        if taken > memory.free:
            raise ValueError(_too_large(fixed, taken, memory))
        budget = max(0, memory.budget(fraction) - taken)
        least = sum(claims[i].least * each for i, each in open_)
        if least > budget:
            raise ValueError(
                _too_little([(claims[i], each) for i, each in open_], budget, memory, fraction)
            )
        more = sum((claims[i].pages - claims[i].least) * each for i, each in open_)
        for i, _ in open_:
            claim, left = claims[i], budget - least
            extra = claim.pages - claim.least
            if more > left:
                extra = extra * left // more
            pages[i] = min(pages[i], claim.least + extra)
    return pages


def _memories(claims: Sequence[Claim]) -> list[_Memory]:
    """List the memories that hold the pools and report their free bytes.

    CPU devices share the host's memory.
    """
    found: dict[object, _Memory] = {}
    for number, claim in enumerate(claims):
        each = claim.layout.device_page_bytes
        here: dict[object, int] = {}
        for device in claim.devices:
            free = free_bytes(device)
            place: object = id(device)
            if free is None and device.platform == "cpu":
                place = "host"
                if place not in found and (free := available_bytes()) is not None:
                    found[place] = _Memory("the host", free, 0.5, [])
            elif free is not None and place not in found:
                found[place] = _Memory("a device", free, 1.0, [])
            if place in found:
                here[place] = here.get(place, 0) + each
        for place, nbytes in here.items():
            found[place].claims.append((number, nbytes))
            found[place].need(claim.needs)
    return list(found.values())


def _too_large(fixed: Sequence[tuple[Claim, int]], taken: int, memory: _Memory) -> str:
    sizes = " and ".join(dict.fromkeys(f"{claim.field}={claim.pages}" for claim, _ in fixed))
    each = sum(nbytes for _, nbytes in fixed)
    return (
        f"{sizes}: {taken / 1e9:.2f} GB in all, but {memory.free / 1e9:.2f} GB are free on "
        f"{memory.name}; at most {memory.free // each} pages fit, or None takes what fits"
    )


def _too_little(
    claims: Sequence[tuple[Claim, int]], budget: int, memory: _Memory, fraction: float | None
) -> str:
    fields = " and ".join(dict.fromkeys(f"{claim.field}=None" for claim, _ in claims))
    each = sum(nbytes for _, nbytes in claims)
    half = "" if memory.share == 1 else "half of "
    fitting, least = budget // each, max(claim.least for claim, _ in claims)
    fixed = max(claim.part[1] for claim, _ in claims)
    longest = max(0, fitting - 1 - fixed) * min(claim.layout.page_size for claim, _ in claims)
    parts = "".join(f", {claim.part[0]}={claim.part[1]}" for claim, _ in claims if claim.part[1])
    return (
        f"{fields}: {memory.says(fraction)} of {half}the {memory.free / 1e9:.2f} GB that "
        f"are free on {memory.name} hold {fitting} pages of {each / 1e6:.2f} MB, "
        f"{len(claims)} pools together; must be at least {least}, the null page{parts} and one "
        f"context of {claims[0][0].context} tokens (model.max_model_len), of which "
        f"{longest} would fit"
    )


def free_bytes(device: Device) -> int | None:
    """Return the bytes that may still be allocated; None where the platform reports no limit."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats or "bytes_in_use" not in stats:
        return None
    return max(0, stats["bytes_limit"] - stats["bytes_in_use"])
