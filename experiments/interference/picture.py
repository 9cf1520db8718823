"""Draws the picture of `interference`: the share of gaps between tokens up to each length."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.figures import new_figure, save_figure

PHASES = ("quiet", "loaded")

SHARES = np.arange(1, 1000) / 1000
"""Shares of the gaps at which a curve is stored."""

_LOOKS = {
    "disaggregated": ("#1f77b4", "disaggregated, prefill on devices of its own"),
    "colocated": ("#d62728", "colocated, prefill in chunks of {budget:,} tokens"),
}


def draw(whole: dict[str, Any], path: Path) -> None:
    """Draw a curve for each phase of each mode, and vLLM's 99th percentile, as PNG, PDF or SVG by
    name.

    Raises:
      ValueError: matplotlib is not installed.
    """
    figure = new_figure(8, 5.5)
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes = figure.subplots()
    rival = whole["vllm"] or {"itl_ms": {}}
    for mode, seen in whole["modes"].items():
        color, name = _LOOKS[mode]
        for phase, style in zip(PHASES, (":", "-"), strict=True):
            p99 = seen[phase]["itl_ms"]["p99"]
            label = f"{name.format(**seen)}; {phase}: p99 {p99:.1f} ms"
            axes.plot(seen[phase]["curve_ms"], SHARES, style, color=color, label=label)
        if f"{mode} loaded" in rival["itl_ms"]:
            _, p99, _ = rival["itl_ms"][f"{mode} loaded"]
            axes.plot([p99], [0.99], "|", color=color, markersize=20, mew=2)
            text = f"vLLM, {mode},\n{rival['device']}, loaded:\np99 {p99} ms"
            axes.annotate(
                text,
                (p99, 0.99),
                xytext=(-6, 0),
                textcoords="offset points",
                color=color,
                fontsize=8,
                ha="right",
                va="bottom",
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yscale("function", functions=(_nines, lambda nines: 1 - 10.0 ** -np.asarray(nines)))
    axes.set_ylim(0, SHARES[-1])
    shares = (0, 0.5, 0.9, 0.99, 0.999)
    axes.set_yticks(shares, [f"{100 * share:g}%" for share in shares])
    axes.grid(alpha=0.3, which="both")
    axes.set_xlabel("time between two tokens of a row, ms")
    axes.set_ylabel("share of the gaps at or below")
    load, kinds = whole["load"], whole.get("devices", [])
    devices = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))
    axes.set_title(
        f"{whole['model']} on {devices}: {load['rows']} rows decode, {load['prompt']:,} tokens in\n"
        f"loaded: meanwhile prompts of {load['long']:,} tokens come back to back",
        fontsize=10,
    )
    figure.legend(fontsize=8, loc="outside lower center", ncols=1)
    save_figure(figure, path)


def _nines(share: Any) -> Any:
    """Scale shares so that each further nine takes as much room: the tail is what matters."""
    return -np.log10(np.maximum(1 - np.asarray(share), 1e-9))
