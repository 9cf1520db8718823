"""The picture of one hand-off in close-up: the prefill step that computes its KV, each shipment's
way, the ticks that it decodes in, and what its request did meanwhile."""

from collections import Counter
from typing import Any

from pdjax.host.metrics.request import RequestMetrics, phases
from pdjax.host.metrics.timeline import KVFlow, Step, Timeline
from pdjax.host.metrics.trace import shipment_parts
from pdjax.pictures.figure import BLACK, BLUE, GREEN, GREY, ORANGE, SKY, new_figure
from pdjax.pictures.timeline import PHASE_COLORS, size_of

_PARTS = {
    "gather": ("#A6DCCB", "gather: waits for its layers, is read"),
    "wire": (GREEN, "on the wire"),
    "scatter": (SKY, "scatter: waits for the decode mesh, is written"),
}
MOST_SHIPMENTS = 16
"""Shipments that have a lane; of more, the last ones."""
_LEAST = 0.004
"""Least width of what is on the wire, of the whole: else it could not be seen."""
_BAR = 0.7
"""Height of a bar, of the height of its lane."""


def draw_handoff(timeline: Timeline, sequence: str | None = None, title: str = "") -> Any:
    """Draw a hand-off.

    Args:
      timeline: what a recorder holds: `Timeline.of(recorder)`.
      sequence: whose, by its id, such as "r0#0"; None takes the one with the most shipments.
      title: above the picture; "" says whose it is and how much moved.

    Returns:
      a matplotlib Figure; milliseconds from the start of the first prefill step that it left with.

    Raises:
      ValueError: matplotlib is not installed, or no such hand-off is known from end to end.
    """
    every = _chosen(timeline, sequence)
    flows = every[-MOST_SHIPMENTS:]
    figure = new_figure(10, 2.2 + 0.42 * (len(flows) + 3))
    close_up = _CloseUp(figure.subplots(), timeline, flows)
    close_up.draw_steps()
    close_up.draw_shipments()
    close_up.draw_request()
    close_up.finish()
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    moved, ends = sum(flow.shipment.bytes for flow in every), flows[0].shipment
    what = f"Hand-off of {flows[0].sequence}: {size_of(moved)} from {ends.source} to {ends.target}"
    if len(flows) < len(every):
        what += f"; the last {len(flows)} of {len(every)} shipments"
    figure.suptitle(title or what, fontsize=11)
    return figure


def _wire_last(part: tuple[str, float, float]) -> bool:
    """Sorts the parts of a shipment so that what is on the wire is not drawn over."""
    return part[0] == "wire"


def _chosen(timeline: Timeline, sequence: str | None) -> list[KVFlow]:
    """The flows of a hand-off, in the order of their shipments."""
    whole = [flow for flow in timeline.flows if flow.step is not None and flow.tick is not None]
    if sequence is None:
        counted = Counter(flow.sequence for flow in whole)
        sequence = max(counted, key=lambda name: counted[name], default=None)
    flows = [flow for flow in whole if flow.sequence == sequence]
    if not flows:
        known = ", ".join(dict.fromkeys(flow.sequence for flow in whole)) or "none"
        raise ValueError(
            f"sequence={sequence!r}: has no hand-off that is known from end to end; those that do: "
            f"{known}"
        )
    return [flow for flow in flows if flow.tick == flows[0].tick]


class _CloseUp:
    """Draws the lanes of a hand-off: prefill, a lane a shipment, decode, the request."""

    def __init__(self, axes: Any, timeline: Timeline, flows: list[KVFlow]) -> None:
        self.axes, self.timeline, self.flows = axes, timeline, flows
        self.steps = [flow.step for flow in flows if flow.step is not None]
        [self.tick] = [flow.tick for flow in flows[:1] if flow.tick is not None]
        self.metrics = self._metrics()
        self.zero = min(step.start for step in self.steps)
        tokens = [moment for moment in self.metrics.token_times if moment >= self.tick.end - 1e-9]
        ends = [flow.shipment.end for flow in flows]
        last = max([self.tick.end, *tokens[:2], *ends])
        margin = 0.03 * (last - self.zero)
        self.window = self.zero - margin, last + margin
        self.of_ticks = len(flows) + 1  # the lane
        self.of_request = len(flows) + 2
        self.labelled = set[str]()

    def _metrics(self) -> RequestMetrics:
        """The request that it is of; ids may come again."""
        alike = [each for each in self.timeline.requests if each.id == self.flows[0].sequence]
        before = [each for each in alike if each.arrival <= self.tick.end]
        return max(before, key=lambda each: each.arrival)

    def draw_steps(self) -> None:
        """Steps and ticks in the window; those of the hand-off are full in colour."""
        self._steps(0, self.steps[0].span.track, self.steps, BLUE, "prefill step")
        self._steps(self.of_ticks, self.tick.span.track, [self.tick], ORANGE, "decode tick")

    def _steps(self, lane: int, track: str, own: list[Step], color: str, name: str) -> None:
        for step in self.timeline.steps[track]:
            if step in own:
                label = f"{name} that it leaves with" if lane == 0 else f"first {name} with it"
                self._bar(lane, step.start, step.end, color, label)
            else:
                self._bar(lane, step.start, step.end, GREY, "other steps and ticks", alpha=0.5)

    def draw_shipments(self) -> None:
        """The way of each shipment, and arrows to it and from it."""
        for lane, flow in enumerate(self.flows, start=1):
            shipment, step = flow.shipment, flow.step
            for part, begin, end in sorted(shipment_parts(shipment), key=_wire_last):
                color, label = _PARTS[part]
                least = _LEAST * (self.window[1] - self.window[0]) if part == "wire" else 0
                self._bar(lane, begin, max(end, begin + least), color, label, edge=0)
            assert step is not None
            leaves = min(max(shipment.on_wire, step.start), step.end)
            self._arrow((leaves, _BAR / 2), (shipment.on_wire, lane - _BAR / 2), BLACK)
            arrives = self.tick.start, self.of_ticks - _BAR / 2
            self._arrow((shipment.arrived, lane + _BAR / 2), arrives, "#666666")

    def draw_request(self) -> None:
        """The phases of the request, and its tokens."""
        for name, begin, end in phases(self.metrics):
            shown = min(end, self.window[1]) - max(begin, self.window[0])
            fits = shown > 0.012 * len(name) * (self.window[1] - self.window[0])
            label = "" if fits or shown <= 0 else f"request: {name}"
            self._bar(self.of_request, begin, end, PHASE_COLORS[name], label)
            if fits:
                middle = self._ms(max(begin, self.window[0]) + shown / 2)
                style = {"ha": "center", "va": "center", "fontsize": 8, "color": "white"}
                self.axes.text(middle, self.of_request, name, **style)
        for moment in self.metrics.token_times:
            if self.window[0] <= moment <= self.window[1]:
                look = {"color": BLACK, "ms": 6, "label": self._once("token")}
                self.axes.plot(self._ms(moment), self.of_request - 0.5, "v", **look)

    def finish(self) -> None:
        """Names of the lanes, and the axes."""
        names = [
            self.steps[0].span.track,
            *(
                f"step {step.span.number}, layers {s.layers[0]}-{s.layers[-1]}, {size_of(s.bytes)}"
                for step, s in zip(self.steps, (flow.shipment for flow in self.flows), strict=True)
            ),
            self.tick.span.track,
            f"request {self.metrics.id}",
        ]
        self.axes.set_yticks(range(len(names)), names)
        self.axes.set_ylim(len(names) - 0.4, -0.6)
        self.axes.set_xlim(*map(self._ms, self.window))
        self.axes.set_xlabel("milliseconds from the start of the prefill step")
        self.axes.grid(axis="x", alpha=0.3)

    def _ms(self, moment: float) -> float:
        return (moment - self.zero) * 1e3

    def _once(self, label: str) -> str | None:
        """A label for the legend, where it has not been given."""
        if not label or label in self.labelled:
            return None
        self.labelled.add(label)
        return label

    def _bar(
        self,
        lane: int,
        begin: float,
        end: float,
        color: str,
        label: str,
        alpha: float = 1.0,
        edge: float = 0.6,
    ) -> None:
        begin, end = max(begin, self.window[0]), min(end, self.window[1])
        if end < begin:
            return
        self.axes.broken_barh(
            [(self._ms(begin), (end - begin) * 1e3)],
            (lane - _BAR / 2, _BAR),
            facecolors=color,
            edgecolors="white",
            linewidth=edge,
            alpha=alpha,
            label=self._once(label),
        )

    def _arrow(self, source: tuple[float, float], target: tuple[float, float], color: str) -> None:
        look = {"arrowstyle": "-|>", "color": color, "lw": 0.8, "shrinkA": 0, "shrinkB": 0}
        places = [(self._ms(moment), lane) for moment, lane in (target, source)]
        self.axes.annotate("", *places, arrowprops=look)
