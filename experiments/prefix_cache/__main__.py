"""How much of real prompts does a prefix cache find, by its size, its policy and its engines?

Prompts of a production trace are played to the prefix index, the page allocator, the eviction
policies and the routers that serve, without a model and without time. A line is a point:

  TRACE POLICY CAPACITY RATE     such as: conversation lru 3M 0.138

RATE is the tokens found over all tokens of the prompts; the table at the end has the share of
prefill's FLOPs that this saves, too, for which tokens late in a prompt count more. CAPACITY is in
tokens, of all engines together; with "unlimited" nothing is evicted: that is the ceiling. One cache
serves all engines unless POLICY ends with "/ENGINES-ROUTER": then each has its share of the
capacity, and the router sends prompts to them.

The traces are Mooncake's (Qin et al., FAST 2025), in blocks of 512 tokens; they travel with this
folder. Others in Mooncake's form are read by their paths.

Predicted before the first run: (1) `prefix_lru` finds as much as `lru` or more, for which the end
of a prompt is worth as much as its beginning; (2) `lfu` and `cost_aware` find more than both at
3M tokens, since most blocks are never used again; (3) eight caches of an eighth each lose more than
a tenth behind `round_robin`, and less than that behind `prefix_aware`.

  python -m experiments.prefix_cache --out=results/prefix_cache.json --plot=results/prefix_cache.png
  python -m experiments.prefix_cache --traces=synthetic --policies=lru --capacities=10M --engines=1
"""

import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from absl import flags

from experiments.common.figures import new_figure, save_figure
from experiments.common.origin import origin, save
from experiments.common.shapes import MODELS
from experiments.common.tables import table
from experiments.prefix_cache.replay import Cache, Lookup, found_in_one, found_in_several, lookups
from experiments.prefix_cache.traces import NAMES, read_trace
from pdjax.config import Config, PoliciesConfig
from pdjax.core.kv_layout import KVLayout
from pdjax.core.recompute import RecomputeCost
from pdjax.flags import new_flags, run
from pdjax.host.policies.registry import POLICIES, make_policies
from pdjax.workloads.files import MOONCAKE_BLOCK

UNLIMITED = "unlimited"
LAYOUT = KVLayout.of_heads(32, 8, 128, MOONCAKE_BLOCK, "bfloat16", itemsize=2)
RECOMPUTE = RecomputeCost.of(MODELS["llama3_8b"], 32 * 4096 * (6144 + 4096 + 3 * 14336))
"""A page takes the bytes and FLOPs of Llama 3 8B."""

FLAGS = new_flags()
_TRACES = flags.DEFINE_list("traces", list(NAMES), "names, or paths of files", flag_values=FLAGS)
_POLICIES = flags.DEFINE_list(
    "policies", list(POLICIES["eviction"]), "eviction policies", flag_values=FLAGS
)
_CAPACITIES = flags.DEFINE_list(
    "capacities", ["3M", "10M", "30M", UNLIMITED], "tokens of all engines", flag_values=FLAGS
)
_ENGINES = flags.DEFINE_list(
    "engines", ["2", "8"], "engines that have caches of their own", flag_values=FLAGS
)
_ROUTERS = flags.DEFINE_list(
    "routers", ["round_robin", "prefix_aware"], "before such engines", flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", "results/prefix_cache.json", "file to write", flag_values=FLAGS)
_PLOT = flags.DEFINE_string("plot", None, "file of a figure; needs matplotlib", flag_values=FLAGS)


@dataclass(frozen=True)
class Point:
    """A replay.

    Attributes:
      engines, router: that have caches of their own, and what is before them; with one engine no
        router is asked.
      rate: tokens found over all tokens.
      saved: the share of the FLOPs of prefill that need not be computed.
      seconds: processor time of the replay, without the hashing of prompts.
    """

    trace: str
    policy: str
    capacity: str
    engines: int
    router: str
    rate: float
    saved: float
    seconds: float

    @property
    def way(self) -> str:
        """The policy, and the engines where there are several."""
        return self.policy + (f"/{self.engines}-{self.router}" if self.engines > 1 else "")

    def __str__(self) -> str:
        return f"{self.trace} {self.way} {self.capacity} {self.rate:.3f}"


def tokens_of(capacity: str) -> int | None:
    """Read a number of tokens such as "3M" or "500k"; None where it is unlimited.

    Raises:
      ValueError: it is none.
    """
    if capacity == UNLIMITED:
        return None
    scale = {"k": 10**3, "M": 10**6}.get(capacity[-1:], 1)
    digits = capacity[:-1] if scale > 1 else capacity
    if not digits.isdecimal() or int(digits) < 1:
        raise ValueError(
            f"capacities={capacity}: must be tokens, such as 500000, 500k or 3M, or {UNLIMITED}"
        )
    return int(digits) * scale


def pages_of(trace: Seq[Lookup], capacity: str, engines: int) -> int:
    """Pages of each cache.

    Raises:
      ValueError: the longest prompt does not fit.
    """
    tokens = tokens_of(capacity)
    if tokens is None:
        return sum(len(lookup.keys) for lookup in trace)
    pages, longest = tokens // engines // MOONCAKE_BLOCK, max(len(each.keys) for each in trace)
    if pages < longest:
        raise ValueError(
            f"capacities={capacity}: {pages} pages of {MOONCAKE_BLOCK} tokens on each of {engines} "
            f"engines; the longest prompt needs {longest}"
        )
    return pages


def measure(
    name: str, trace: Seq[Lookup], policy: str, capacity: str, engines: int = 1, router: str = ""
) -> Point:
    """Replay a trace once.

    Raises:
      ValueError: no such policy or router, or a capacity that is too small.
    """
    chosen = PoliciesConfig(eviction=policy, router=router or PoliciesConfig.router)
    policies, pages = make_policies(Config(policies=chosen)), pages_of(trace, capacity, engines)
    caches = [
        Cache(LAYOUT, pages, policies.eviction.order(LAYOUT, RECOMPUTE)) for _ in range(engines)
    ]
    start = time.process_time()
    if engines == 1:
        found = found_in_one(trace, caches[0])
    else:
        found = found_in_several(trace, caches, policies.router)
    seconds, lengths = time.process_time() - start, [lookup.length for lookup in trace]
    rate = sum(found) / sum(lengths)
    flops = [sum(RECOMPUTE.flops(0, tokens) for tokens in each) for each in (found, lengths)]
    return Point(name, policy, capacity, engines, router, rate, flops[0] / flops[1], seconds)


def points(name: str, trace: Seq[Lookup]) -> Iterator[Point]:
    """Every policy and capacity with one cache, then engines with caches of their own and the
    default policy."""
    capacities = _CAPACITIES.value or []
    for policy, capacity in product(_POLICIES.value or [], capacities):
        yield measure(name, trace, policy, capacity)
    for engines, router, capacity in product(
        _ENGINES.value or [], _ROUTERS.value or [], capacities
    ):
        yield measure(name, trace, PoliciesConfig.eviction, capacity, int(engines), router)


def show(found: Seq[Point]) -> str:
    """Make the table: a row for each trace and way, for each capacity the rate and the share of
    FLOPs that it saves."""
    capacities = list(dict.fromkeys(point.capacity for point in found))
    at = {(p.trace, p.way, p.capacity): f"{p.rate:.3f} {p.saved:.3f}" for p in found}
    rows = [
        [f"{name}, {way}", *(at.get((name, way, each), "-") for each in capacities)]
        for name, way in dict.fromkeys((p.trace, p.way) for p in found)
    ]
    return table(["trace, policy: tokens, FLOPs", *capacities], rows)


def outcome(found: Seq[Point]) -> dict[str, bool]:
    """Whether each prediction holds on all traces, of those that what was measured can tell."""
    rates = {(p.trace, p.way, p.capacity): p.rate for p in found}
    told: dict[str, list[bool]] = {}

    def compare(what: str, a: str, b: str, holds: Any, capacity: str | None = None) -> None:
        for (name, way, at), rate in rates.items():
            other = rates.get((name, b, at))
            if way == a and other is not None and capacity in (None, at):
                told.setdefault(what, []).append(holds(rate, other))

    first = PoliciesConfig.eviction
    compare("ends go first", first, "lru", lambda a, b: a >= b)
    for policy in ("lfu", "cost_aware"):
        compare(f"{policy} finds more at 3M", policy, first, lambda a, b: a > b, "3M")
    compare("round_robin loses", f"{first}/8-round_robin", first, lambda a, b: a < 0.9 * b)
    compare("prefix_aware does not", f"{first}/8-prefix_aware", first, lambda a, b: a >= 0.9 * b)
    return {what: all(each) for what, each in told.items()}


def draw(found: Seq[Point], path: Path) -> None:
    """Draw the rate over the capacity, a line for each way, beside the ceiling."""
    names = list(dict.fromkeys(point.trace for point in found))
    figure = new_figure(4.5 * len(names), 4.5)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for way in dict.fromkeys(p.way for p in found if p.trace == name):
            line = [
                (tokens_of(p.capacity), p.rate) for p in found if (p.trace, p.way) == (name, way)
            ]
            limited = sorted((x / 1e6, rate) for x, rate in line if x is not None)
            axes.plot(*zip(*limited, strict=True), "o-" if "/" not in way else "s--", label=way)
        ceiling = [p.rate for p in found if (p.trace, p.capacity) == (name, UNLIMITED)]
        if ceiling:
            axes.axhline(max(ceiling), color="grey", linewidth=1, label="ceiling")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_title(name)
        axes.set_xlabel("capacity of all engines, million tokens")
        axes.set_ylabel("tokens found / tokens of prompts")
        axes.legend(fontsize="x-small")
    save_figure(figure, path)


def main() -> None:
    """Measure, print, save; see the module."""
    found: list[Point] = []
    hashed: dict[str, float] = {}
    for trace in _TRACES.value or []:
        name, start = trace if trace in NAMES else Path(trace).stem, time.process_time()
        asked = list(lookups(read_trace(trace)))
        hashed[name] = time.process_time() - start
        for point in points(name, asked):
            print(point, flush=True)
            found.append(point)
    held = outcome(found)
    print(f"\n{show(found)}\n")
    print("\n".join(f"predicted: {what}: {'right' if held[what] else 'WRONG'}" for what in held))
    whole: dict[str, Any] = {"points": [asdict(each) for each in found], "predicted": held}
    whole |= {"hashing_s": hashed, "recompute": asdict(RECOMPUTE)}
    save(origin() | whole, _OUT.value)
    if _PLOT.value:
        draw(found, Path(_PLOT.value))


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
