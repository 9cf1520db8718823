"""What a config has room for: weights, pools, pages, tokens and requests, by the code that sizes
the pools of a start."""

import os
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from typing import Any

from pdjax.config import Config
from pdjax.config.tiers import GB
from pdjax.core.kv_layout import KVLayout
from pdjax.core.messages import shown
from pdjax.core.model_spec import ModelSpec
from pdjax.core.roles import Role
from pdjax.device.claims import Claims, PoolClaim
from pdjax.device.devices import dealt
from pdjax.device.kv.sizing import deal_pages, free_bytes
from pdjax.explain.text import aligned
from pdjax.workloads.arrival import Arrival

JAX_SHARE = 0.75
"""What JAX takes of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


@dataclass(eq=False)
class PlannedChip:
    """A device that need not be there; see `mesh.Device`.

    Attributes:
      limit: bytes that JAX may take.
      taken: bytes in use.
    """

    limit: int
    taken: int = 0
    platform: str = "planned"

    def memory_stats(self) -> dict[str, int]:
        """As a GPU's."""
        return {"bytes_limit": self.limit, "bytes_in_use": self.taken}


@dataclass(frozen=True)
class Lengths:
    """The requests that are to fit.

    Attributes:
      name: of them.
      requests: tokens of the prompt, and of the answer, of each.
    """

    name: str
    requests: Seq[tuple[int, int]]

    @classmethod
    def of(cls, arrivals: Seq[Arrival]) -> "Lengths":
        """Those of a workload."""
        found = [(each.prompt, each.output) for each in arrivals]
        prompt, output = (round(sum(column) / len(found)) for column in zip(*found, strict=True))
        return cls(f"{prompt:,}+{output:,} tokens", found)

    @classmethod
    def longest(cls, context: int) -> "Lengths":
        """Requests that fill the context, prompt and answer together. Of a prefill pool, they are
        prompts that leave room for one token."""
        return cls(f"{context:,} tokens", [(context - 1, 1)])

    def pages(self, layout: KVLayout, role: Role) -> float:
        """Pages of a request in a pool, in the mean: of its prompt where it is only prefilled, else
        of all but its last token, whose KV nobody reads."""
        tokens = [p + (o - 1 if role.decodes else 0) for p, o in self.requests]
        return sum(map(layout.pages_for, tokens)) / len(tokens)


@dataclass(frozen=True)
class PoolPlan:
    """A pool, and what it has room for.

    Attributes:
      id: its name. role: of its engines; "none" of a tier. tier: where its pages lie.
      chips: devices that it is spread over.
      weight_bytes, free_bytes: on a device: of the weights, and what they leave; the latter also
        of other engines on the same devices.
      page_bytes: of a page on a device. page_size: tokens of one.
      pages: that can be handed out, without the null page.
      bound: what the number of pages is bound by.
      requests: by the names of lengths, how many fit at once, and what bounds that.
    """

    id: str
    role: str
    tier: str
    chips: int
    weight_bytes: int
    free_bytes: int
    page_bytes: int
    page_size: int
    pages: int
    bound: str
    requests: dict[str, tuple[int, str]]

    @property
    def tokens(self) -> int:
        """That its pages hold."""
        return self.pages * self.page_size

    @property
    def kv_bytes(self) -> int:
        """Of the pool on a device, null page included."""
        return (self.pages + 1) * self.page_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """What a config has room for.

    Attributes:
      chips: devices in all.
      chip_bytes: memory of one. share: of it that JAX may take.
      program_bytes: that programs take beside weights and pools; None where that is not known, so
        that `kv.memory_fraction`, or nine tenths, of what the weights leave are for pools.
      pools: those that prefill first, and tiers last.
      requests: by the names of lengths, how many decode at once on all engines together.
    """

    chips: int
    chip_bytes: int
    share: float
    program_bytes: int | None
    pools: tuple[PoolPlan, ...]
    requests: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        pools = [
            {
                **asdict(pool),
                "tokens": pool.tokens,
                "kv_bytes": pool.kv_bytes,
                "requests": {
                    name: {"count": count, "bound": bound}
                    for name, (count, bound) in pool.requests.items()
                },
            }
            for pool in self.pools
        ]
        return {**asdict(self), "pools": pools}


def share_of_jax() -> float:
    """Of a chip's memory, what JAX may take in this environment.

    Raises:
      ValueError: XLA_PYTHON_CLIENT_MEM_FRACTION is no number.
    """
    said = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    try:
        return JAX_SHARE if said is None else float(said)
    except ValueError as error:
        raise ValueError(
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={shown(said)}: must be a number in (0, 1]"
        ) from error


def plan_memory(
    config: Config,
    spec: ModelSpec,
    context: int,
    lengths: Seq[Lengths],
    *,
    chip_bytes: int,
    share: float = JAX_SHARE,
    program_bytes: int | None = None,
) -> MemoryPlan:
    """Work out what a config has room for on chips of a given memory; none need be there.

    Args:
      spec: the model's shapes.
      context: longest sequence served, tokens.
      lengths: of the requests that are counted.
      chip_bytes: memory of a chip.
      share: of it that JAX may take, in (0, 1].
      program_bytes: that programs take on a chip beside weights and pools, as a start measures it;
        None does not know.

    Raises:
      ValueError: a layout that cannot work, weights or pools that do not fit, or a share out of
        range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"memory_share={share}: must be in (0, 1]")
    limit = int(chip_bytes * share)
    chips = [PlannedChip(limit) for _ in range(config.devices)]
    meshes = [mesh for side in dealt(config, chips) for mesh in side]
    for_prefill, for_decode = meshes[: config.prefill.engines], meshes[config.prefill.engines :]
    asked = Claims(config, spec, context).of(for_prefill, for_decode)
    weights = [each.weight_bytes(spec, config.model.dtype) for each in asked]
    placed = for_prefill if config.colocated else meshes
    for taken, mesh in zip(weights, placed, strict=True):
        for chip in mesh:
            chip.taken += taken
    if (most := max(chip.taken for chip in chips)) > limit:
        raise ValueError(
            f"memory_gb={chip_bytes / 1e9:g}: JAX may take {share:.0%} of that, "
            f"{limit / 1e9:.2f} GB, but the weights on a chip take {most / 1e9:.2f}"
        )
    claims = [replace(each.claim, needs=program_bytes) for each in asked]
    pages = deal_pages(claims, config.kv.memory_fraction)
    plans = tuple(
        _pool(config, each, count, taken, free_bytes(each.claim.devices[0]) or 0, lengths)
        for each, count, taken in zip(asked, pages, weights, strict=True)
    )
    decoding = [plan for plan, each in zip(plans, asked, strict=True) if each.role.decodes]
    at_once = {each.name: sum(plan.requests[each.name][0] for plan in decoding) for each in lengths}
    plans += _host_tier(config, replace(asked[0].claim.layout, tp=1), lengths)
    return MemoryPlan(len(chips), chip_bytes, share, program_bytes, plans, at_once)


def _host_tier(config: Config, layout: KVLayout, lengths: Seq[Lengths]) -> tuple[PoolPlan, ...]:
    """The tier in host memory, if the config has one, in which pages of this layout are whole. It
    holds the KV of requests that are not under way."""
    pages = config.tiers.host_pages(layout.page_bytes) - 1
    if pages < 0:
        return ()
    fitting = {each.name: int(pages / each.pages(layout, Role.DECODE)) for each in lengths}
    return (
        PoolPlan(
            id="host/0",
            role="none",
            tier="host",
            chips=0,
            weight_bytes=0,
            free_bytes=int((config.tiers.host_gb or 0) * GB),
            page_bytes=layout.page_bytes,
            page_size=layout.page_size,
            pages=pages,
            bound=f"tiers.host_gb={config.tiers.host_gb}, as the config says",
            requests={name: (count, "pages") for name, count in fitting.items()},
        ),
    )


def _pool(
    config: Config,
    asked: PoolClaim,
    pages: int,
    weight_bytes: int,
    free: int,
    lengths: Seq[Lengths],
) -> PoolPlan:
    claim, layout = asked.claim, asked.claim.layout
    return PoolPlan(
        id=str(asked.id),
        role=asked.role.value,
        tier="device",
        chips=len(claim.devices),
        weight_bytes=weight_bytes,
        free_bytes=free,
        page_bytes=layout.device_page_bytes,
        page_size=layout.page_size,
        pages=pages - 1,
        bound=_bound(config, asked, pages),
        requests={each.name: _at_once(config, asked, pages - 1, each) for each in lengths},
    )


def _bound(config: Config, asked: PoolClaim, pages: int) -> str:
    """What a number of pages is bound by."""
    claim = asked.claim
    if claim.fixed:
        return f"{claim.field}, as the config says"
    if pages < claim.pages:
        return f"memory: {claim.pages - 1:,} pages are wanted"
    p, d = config.prefill, config.decode
    steps = f"prefill.max_sequences={p.max_sequences} in each of {1 + p.lookahead} steps"
    wanted = {"prefill.pages": steps, "decode.pages": f"decode.rows={d.rows}"}
    named = [text for field, text in wanted.items() if field in claim.field]
    fixed = f", and {claim.part[0]}={claim.part[1]}" if claim.part[1] else ""
    return f"wanted: whole contexts of {' and '.join(named)}{fixed}"


def _at_once(config: Config, asked: PoolClaim, pages: int, lengths: Lengths) -> tuple[int, str]:
    """How many requests a pool has room for, and whether rows or pages bound that. Of a prefill
    pool, so many prompts lie there at once."""
    fitting = int(pages / lengths.pages(asked.claim.layout, asked.role))
    rows = config.decode.rows
    if asked.role.decodes and rows <= fitting:
        return rows, "decode.rows"
    return fitting, "pages"


def lines_of(plan: MemoryPlan) -> list[str]:
    """A plan for a terminal."""
    limit = plan.chip_bytes * plan.share
    known = plan.program_bytes is not None
    lines = [
        f"{plan.chips} chips of {plan.chip_bytes / 1e9:.2f} GB, of which JAX may take "
        f"{plan.share:.0%}: {limit / 1e9:.2f} GB",
        f"programs take {_gb(plan.program_bytes or 0)} of that beside weights and pools"
        if known
        else "what programs take is not known before a start compiles them (--programs_gb)",
        "",
    ]
    heads = ["pool", "tier", "chips", "weights, GB", "free, GB", "page, MB", "pages", "KV, GB"]
    rows = [[*heads, "tokens", *(f"requests of {name}" for name in plan.requests)]]
    for pool in plan.pools:
        rows.append(
            [
                *(pool.id, pool.tier, f"{pool.chips}", f"{pool.weight_bytes / 1e9:.2f}"),
                *(f"{pool.free_bytes / 1e9:.2f}", f"{pool.page_bytes / 1e6:.3f}"),
                *(f"{pool.pages:,}", f"{pool.kv_bytes / 1e9:.2f}", f"{pool.tokens:,}"),
                *(f"{count:,} ({bound})" for count, bound in pool.requests.values()),
            ]
        )
    lines += aligned(rows)
    lines += ["", "Why"]
    lines += [f"{pool.id}: {pool.bound}" for pool in plan.pools]
    at_once = "; ".join(f"{count:,} of {name}" for name, count in plan.requests.items())
    return [*lines, "", f"Decode at once: {at_once}"]


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
