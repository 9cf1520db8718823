"""How many pages each pool gets, of the memory that there is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pdjax.core.kv_layout import KVLayout
from pdjax.device.kv.host_memory import available_bytes


class Device(Protocol):
    """What is asked of a `jax.Device`."""

    @property
    def platform(self) -> str:
        """Such as "cpu"."""
        ...

    def memory_stats(self) -> dict[str, int] | None:
        """Bytes in use and allowed, on platforms that count them; None elsewhere."""
        ...


@dataclass(frozen=True)
class Claim:
    """A pool that is to be made.

    Attributes:
      field: of the config that says how large it is, or leaves that open.
      fixed: whether it says so.
      pages: of the pool; where it is left open, most pages.
      layout: of the pool.
      context: longest sequence served, tokens.
      devices: of its mesh.
      part: a field that says how large a part of a pool is that is otherwise left open, and its
        pages.
    """

    field: str
    fixed: bool
    pages: int
    layout: KVLayout
    context: int
    devices: Sequence[Device]
    part: tuple[str, int] = ("", 0)

    @property
    def least(self) -> int:
        """Pages without which no whole context can be served beside the part that is fixed."""
        return min(self.pages, 1 + self.part[1] + self.layout.pages_for(self.context))


@dataclass
class _Memory:
    """Memory that is free, and the pools that need some of it.

    `share` is what pools that are left open may take, besides kv.memory_fraction: of the memory of
    the host one half, since it is other programs', too.
    """

    name: str
    free: int
    share: float
    claims: list[tuple[int, int]]  # which claim, and bytes of its pages here

    def budget(self, fraction: float) -> int:
        return int(self.free * self.share * fraction)


def deal_pages(claims: Sequence[Claim], fraction: float) -> list[int]:
    """The pages of each pool, of the memory that is free now; to be asked when the weights are in
    place.

    A pool that is left open gets its one context first. What is left of a share of the memory is
    dealt out in proportion to what the pools could use.

    Args:
      claims: of all pools of a run.
      fraction: of the free memory that pools may take if they are left open, in (0, 1].

    Raises:
      ValueError: a pool of a fixed size does not fit, or not even one context of the others.
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
    """The memories that the pools are in, as far as it is known how much of them is free. Devices
    that are cores of the host share its memory."""
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
    return list(found.values())


def _too_large(fixed: Sequence[tuple[Claim, int]], taken: int, memory: _Memory) -> str:
    sizes = " and ".join(dict.fromkeys(f"{claim.field}={claim.pages}" for claim, _ in fixed))
    each = sum(nbytes for _, nbytes in fixed)
    return (
        f"{sizes}: {taken / 1e9:.2f} GB in all, but {memory.free / 1e9:.2f} GB are free on "
        f"{memory.name}; at most {memory.free // each} pages fit, or None takes what there is"
    )


def _too_little(
    claims: Sequence[tuple[Claim, int]], budget: int, memory: _Memory, fraction: float
) -> str:
    fields = " and ".join(dict.fromkeys(f"{claim.field}=None" for claim, _ in claims))
    each = sum(nbytes for _, nbytes in claims)
    half = "" if memory.share == 1 else "half of "
    fitting, least = budget // each, max(claim.least for claim, _ in claims)
    fixed = max(claim.part[1] for claim, _ in claims)
    longest = max(0, fitting - 1 - fixed) * min(claim.layout.page_size for claim, _ in claims)
    parts = "".join(f", {claim.part[0]}={claim.part[1]}" for claim, _ in claims if claim.part[1])
    return (
        f"{fields}: {fraction} (kv.memory_fraction) of {half}the {memory.free / 1e9:.2f} GB that "
        f"are free on {memory.name} hold {fitting} pages of {each / 1e6:.2f} MB, "
        f"{len(claims)} pools together; must be at least {least}, the null page{parts} and one "
        f"context of {claims[0][0].context} tokens (model.max_model_len), of which "
        f"{longest} would fit"
    )


def free_bytes(device: Device) -> int | None:
    """Bytes that may still be allocated; None where the platform does not say."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats or "bytes_in_use" not in stats:
        return None
    return max(0, stats["bytes_limit"] - stats["bytes_in_use"])
