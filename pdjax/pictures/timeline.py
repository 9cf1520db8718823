"""The picture of a run: what engines and requests did, hand-offs as arrows, counters below."""

from typing import Any

from pdjax.host.metrics.request import PHASES, RequestMetrics, phases
from pdjax.host.metrics.timeline import Counter, KVFlow, Step, Timeline, lanes
from pdjax.pictures.figure import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    new_figure,
)

MOST_REQUESTS = 40
"""Requests that have a row; of more, the first ones."""

PHASE_COLORS = dict(zip(PHASES, (GREY, BLUE, VERMILION, GREEN, PURPLE, ORANGE), strict=True))
_LINES = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, BLACK, GREY)
_BAR = 0.7
"""Height of a bar, of the height of its lane."""


def draw_timeline(timeline: Timeline, title: str = "") -> Any:
    """Draw a run.

    Args:
      timeline: what a recorder holds: `Timeline.of(recorder)`.
      title: above the picture.

    Returns:
      a matplotlib Figure; seconds from the first moment on.

    Raises:
      ValueError: matplotlib is not installed, or there is nothing to draw.
    """
    if not timeline.steps:
        raise ValueError("timeline: holds no step; serve a request first")
    names, shown = _lane_names(timeline), timeline.requests[:MOST_REQUESTS]
    of_requests = max(1.0, 0.22 * len(shown))
    of_engines = max(1.2, 0.5 * len(names))
    figure = new_figure(11, 1.2 + of_engines + of_requests + 3 * 1.0)
    heights = [of_engines, of_requests, 1.0, 1.0, 1.0]
    axes = figure.subplots(5, 1, sharex=True, height_ratios=heights)
    _draw_engines(axes[0], timeline, names)
    _draw_requests(axes[1], timeline, shown)
    _draw_counters(axes[2], timeline, "sequences", "")
    _draw_counters(axes[3], timeline, "pages", " free")
    _draw_counters(axes[4], timeline, "bytes", " in flight")
    axes[-1].set_xlabel("seconds")
    axes[-1].set_xlim(0, timeline.end - timeline.start)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _lane_names(timeline: Timeline) -> list[str]:
    """Prefill engines, links, decode engines: the way of a request, from the top down."""
    prefills = [name for name, steps in timeline.steps.items() if _prefills(steps)]
    decodes = [name for name in timeline.steps if name not in prefills]
    return [*prefills, *lanes(timeline.shipments), *decodes]


def _prefills(steps: list[Step]) -> bool:
    return any(step.span.number for step in steps)


def _draw_engines(axes: Any, timeline: Timeline, names: list[str]) -> None:
    start = timeline.start
    at = {name: len(names) - 1 - number for number, name in enumerate(names)}
    labelled = set[str]()

    def bars(
        lane: float, spans: list[tuple[float, float]], color: str, label: str, edge: float = 0.3
    ) -> None:
        if spans:
            axes.broken_barh(
                [(begin - start, end - begin) for begin, end in spans],
                (lane - _BAR / 2, _BAR),
                facecolors=color,
                edgecolors="white",
                linewidth=edge,
                label=None if label in labelled else label,
            )
            labelled.add(label)

    for name, steps in timeline.steps.items():
        of_prefill = [(step.start, step.end) for step in steps if step.span.number]
        ticks = [(step.start, step.end) for step in steps if not step.span.number]
        bars(at[name], of_prefill, BLUE, "prefill step")
        bars(at[name], ticks, ORANGE, "decode tick")
    for link, its_lanes in lanes(timeline.shipments).items():
        least = (timeline.end - start) / 1000  # else what takes a microsecond could not be seen
        on_wire = [
            (each.on_wire, max(each.arrived, each.on_wire + least))
            for lane in its_lanes
            for each in lane
        ]
        bars(at[link], on_wire, GREEN, "KV on the wire", edge=0)
    for flow in last_flows(timeline):
        _draw_arrow(axes, flow, at, start)
    axes.plot([], [], "-", color=BLACK, lw=1, label="hand-off, to the first tick with it")
    axes.set_yticks(list(at.values()), [link_name(name) for name in at])
    axes.set_ylim(-0.6, len(names) - 0.4)
    _legend(axes)


def last_flows(timeline: Timeline) -> list[KVFlow]:
    """One flow a hand-off that is known from end to end: that of its last shipment."""
    last: dict[tuple[str, float], KVFlow] = {}
    for flow in timeline.flows:
        if flow.step is not None and flow.tick is not None:
            last[flow.sequence, flow.tick.span.start] = flow
    return list(last.values())


def _draw_arrow(axes: Any, flow: KVFlow, at: dict[str, int], start: float) -> None:
    assert flow.step is not None and flow.tick is not None
    begin = min(max(flow.shipment.on_wire, flow.step.start), flow.step.end)
    source, target = at[flow.step.span.track], at[flow.tick.span.track]
    axes.annotate(
        "",
        xy=(flow.tick.start - start, target + _BAR / 2),
        xytext=(begin - start, source - _BAR / 2),
        arrowprops={"arrowstyle": "-|>", "color": BLACK, "lw": 0.9, "shrinkA": 0, "shrinkB": 0},
    )


def _draw_requests(axes: Any, timeline: Timeline, requests: list[RequestMetrics]) -> None:
    start = timeline.start
    for phase, color in PHASE_COLORS.items():
        label: str | None = phase
        for row, metrics in enumerate(requests):
            spans = [
                (begin - start, end - begin)
                for name, begin, end in phases(metrics)
                if name == phase
            ]
            if spans:
                axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=color, label=label)
                label = None
    axes.set_ylim(len(requests) - 0.4, -0.6)
    several = len(requests) > 12
    axes.set_yticks([] if several else range(len(requests)))
    if not several:
        axes.set_yticklabels([metrics.id for metrics in requests])
    left = len(timeline.requests) - len(requests)
    axes.set_ylabel(f"requests\n(and {left} more)" if left else "requests")
    _legend(axes)


def _draw_counters(axes: Any, timeline: Timeline, unit: str, ending: str) -> None:
    """The counters of a unit, as steps."""
    chosen = [counter for counter in timeline.counters if counter.unit == unit]
    scale, name = _scale(chosen)
    for counter, color in zip(chosen, _LINES * (1 + len(chosen) // len(_LINES)), strict=False):
        moments = [moment - timeline.start for moment, _ in counter.values]
        values = [value / scale for _, value in counter.values]
        moments.append(timeline.end - timeline.start)
        values.append(values[-1])
        label = link_name(counter.name.removesuffix(ending))
        axes.step(moments, values, where="post", color=color, lw=1.2, label=label)
    axes.set_ylim(bottom=0)
    axes.yaxis.get_major_locator().set_params(integer=unit != "bytes")
    axes.set_ylabel(f"{name}{ending}" if name else f"{ending.strip()} {unit}".strip())
    axes.grid(alpha=0.3)
    if chosen:
        _legend(axes)


def _scale(counters: list[Counter]) -> tuple[float, str]:
    """What to divide bytes by, and its name; other units are as they are."""
    if not counters or counters[0].unit != "bytes":
        return 1, ""
    most = max(value for counter in counters for _, value in counter.values)
    for size, name in _SIZES:
        if most >= size:
            return size, name
    return 1, "bytes"


def link_name(name: str) -> str:
    """The name of a link or a pool, shortened: "prefill-0 → decode-0"."""
    ends = name.split("->")
    return " → ".join(end.removeprefix("hbm/") for end in ends)


def size_of(nbytes: int) -> str:
    """Bytes for a reader."""
    for size, name in _SIZES:
        if nbytes >= size:
            return f"{nbytes / size:.3g} {name}"
    return f"{nbytes} B"


_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def _legend(axes: Any) -> None:
    axes.legend(
        fontsize=8, loc="upper left", bbox_to_anchor=(1.005, 1.03), frameon=False, borderaxespad=0
    )
