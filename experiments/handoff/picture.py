"""Draws the picture of `handoff`: the hidden and exposed parts of each way's time on the wire."""

from pathlib import Path
from typing import Any

from experiments.common.figures import new_figure, save_figure
from experiments.handoff.pair import in_groups


def draw(whole: dict[str, Any], path: Path) -> None:
    """Draw bars for the points of a run, beside the physical floor, as PNG, PDF or SVG by name.

    Raises:
      ValueError: matplotlib is not installed.
    """
    points = whole["points"]
    names = [f"{p['prompt']}\n{p['wire']} {in_groups(p['groups'])}\n{p['layout']}" for p in points]
    served = [p["served"] for p in points]
    exposed = [s["exposed_ms"] for s in served]
    hidden = [max(0.0, s["wire_ms"] - s["exposed_ms"]) for s in served]
    figure = new_figure(max(6.0, 0.9 * len(points)), 4.5)
    axes = figure.subplots()
    x = list(range(len(points)))
    axes.bar(x, hidden, color="#9bbfd9", label="on the wire, hidden behind the prefill")
    axes.bar(x, exposed, bottom=hidden, color="#c44e52", label="on the wire, after it (exposed)")
    axes.plot(
        x, [s["floor_ms"] for s in served], "k_", markersize=22, label="floor: bytes / bandwidth"
    )
    axes.plot(
        x,
        [s["added_ms"] for s in served],
        "o",
        color="#222222",
        markersize=4,
        label="added between the prefill's end and the first decode tick",
    )
    axes.set_xticks(x, names, fontsize=7)
    axes.set_xlabel("prompt tokens / format, layer groups / prefill tp x stages x tp")
    axes.set_ylabel("milliseconds")
    devices = ", ".join(sorted(set(whole.get("devices", []))))
    axes.set_title(f"Hand-off of one prompt, {whole['model']}, {devices}", fontsize=10)
    axes.legend(fontsize=8)
    save_figure(figure, path)
