"""What simulated steps and links take: as they were measured, of Llama-3-8B shapes in bfloat16."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.bench_steps.cases import DecodeCase, PrefillCase
from pdjax.sim.costs import StepCosts
from pdjax.sim.links import Link

_MEASURED = Path(__file__).resolve().parents[1] / "measured"
_STEPS = {
    "h100": ("h100/bench_steps.json",),
    "h200": ("h200/bench_steps.json", "h200/tick_rows.json"),
}
_LINKS = {
    "h100": ("2xh100/handoff.json", Link(bandwidth=371e9, latency=273e-6)),
    "h200": ("2xh200/handoff.json", Link(bandwidth=396e9, latency=165e-6)),
}
"""By plain puts of a hand-off of 2,048 and one of 8,192 tokens."""

LONGEST = 4096
"""Tokens of the longest prompt whose step is fitted: of a longer one the quadratic part of
attention lies within the step, which `StepCosts` does not know."""


class MeasuredStep(NamedTuple):
    """A step that was timed alone.

    Attributes:
      number: active rows of a tick; computed tokens of a prefill step.
      kv_tokens: tokens of KV that it reads.
      seconds: that it took.
    """

    number: int
    kv_tokens: int
    seconds: float


@dataclass(frozen=True)
class Chip:
    """A chip whose steps were measured, and the link between two.

    Attributes:
      hardware: its name.
      sources: files of measurements.
      ticks, prefills: the steps that were measured.
      costs: fitted to them.
      link: between two.
    """

    hardware: str
    sources: tuple[str, ...]
    ticks: tuple[MeasuredStep, ...]
    prefills: tuple[MeasuredStep, ...]
    costs: StepCosts
    link: Link

    @classmethod
    def load(cls, name: str) -> "Chip":
        """The chip of a name.

        Raises:
          ValueError: no such chip.
        """
        if name not in _STEPS:
            raise ValueError(f"costs={name!r}: allowed are {', '.join(_STEPS)}")
        ticks, prefills, hardware = list[MeasuredStep](), list[MeasuredStep](), ""
        for file in _STEPS[name]:
            whole = json.loads((_MEASURED / file).read_text("utf-8"))
            hardware = whole["devices"][0]
            for each in whole["decode"]:
                case = DecodeCase.parse(each["case"])
                ticks.append(MeasuredStep(case.rows, case.tokens, each["ms"] / 1e3))
            for each in whole["prefill"]:
                chunks = PrefillCase.parse(each["case"]).chunks
                if max(computed for computed, _ in chunks) <= LONGEST:
                    tokens = sum(computed for computed, _ in chunks)
                    read = sum(computed + earlier for computed, earlier in chunks)
                    prefills.append(MeasuredStep(tokens, read, each["ms"] / 1e3))
        file, link = _LINKS[name]
        costs = fit_costs(ticks, prefills)
        sources = (*_STEPS[name], file)
        return cls(hardware, sources, tuple(ticks), tuple(prefills), costs, link)

    def with_link(self, link: Link) -> "Chip":
        """The same chips with another link between them."""
        return replace(self, link=link)

    def validity(self) -> list[str]:
        """Sentences about what it is of, how well the fit does, and where it was not measured."""
        ticks = max(abs(tick_seconds(self.costs, t) / t.seconds - 1) for t in self.ticks)
        steps = max(abs(prefill_seconds(self.costs, p) / p.seconds - 1) for p in self.prefills)
        rows = max(t.number for t in self.ticks)
        tokens = min(p.number for p in self.prefills)
        rate, latency = self.link.bandwidth / 1e9, self.link.latency * 1e6
        return [
            f"Steps cost what they were measured to cost on one {self.hardware} for Llama-3-8B "
            f"shapes in bfloat16: ticks of up to {rows} rows, within {ticks:.1%}, and prefill "
            f"steps of {tokens:,} tokens and more, within {steps:.1%}. Beyond that, and in smaller "
            "chunks, costs are extrapolated.",
            "Mixed steps were not measured: their cost is composed of those of their parts, with "
            "the weights read once.",
            f"A link moves {rate:.0f} GB/s after {latency:.0f} us. The host's own time, HTTP and "
            "the network are not simulated.",
        ]


def tick_seconds(costs: StepCosts, tick: MeasuredStep) -> float:
    """What a tick costs, whatever it was measured to take."""
    return costs.tick + tick.number * costs.tick_row + tick.kv_tokens * costs.tick_kv_token


def prefill_seconds(costs: StepCosts, step: MeasuredStep) -> float:
    """What a prefill step costs, whatever it was measured to take."""
    each = step.number * costs.prefill_token + step.kv_tokens * costs.prefill_kv_token
    return costs.prefill_step + each


def fit_costs(ticks: Sequence[MeasuredStep], prefills: Sequence[MeasuredStep]) -> StepCosts:
    """Fit the constants of `StepCosts`, none below 0, by least squares of the relative error.

    A tick takes `tick + tick_row x rows + tick_kv_token x tokens of KV`, a prefill step likewise,
    as in DistServe's simulator. Of the quadratic part of attention a prefill step has what lies in
    the KV that it reads.

    Raises:
      ValueError: no ticks or no prefill steps.
    """
    if not ticks or not prefills:
        raise ValueError(f"{len(ticks)} ticks, {len(prefills)} prefill steps: at least one of each")
    tick, tick_row, tick_kv = _fitted(ticks)
    step, token, kv = _fitted(prefills)
    return StepCosts(
        prefill_step=step,
        prefill_token=token,
        prefill_kv_token=kv,
        tick=tick,
        tick_row=tick_row,
        tick_kv_token=tick_kv,
    )


def _fitted(steps: Sequence[MeasuredStep]) -> tuple[float, float, float]:
    """Seconds of a step, of each of its number and of each token of KV: the best of the fits with
    some of them 0 that has none below 0."""
    rows = np.array([[1.0, each.number, each.kv_tokens] for each in steps])
    rows /= np.array([each.seconds for each in steps])[:, None]
    best, least = np.zeros(3), np.inf
    for chosen in range(1, 8):
        kept = [i for i in range(3) if chosen >> i & 1]
        found, *_ = np.linalg.lstsq(rows[:, kept], np.ones(len(rows)), rcond=None)
        error = float(np.sum((rows[:, kept] @ found - 1) ** 2))
        # Fewer constants are preferred where they fit as well.
        if found.min() >= 0 and error < least - 1e-12:
            best, least = np.zeros(3), error
            best[kept] = found
    return float(best[0]), float(best[1]), float(best[2])
