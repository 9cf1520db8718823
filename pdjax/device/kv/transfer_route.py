"""Which stage sends which layers to which stage: the plan of a transfer job, without any bytes.

Programs are SPMD: every stage runs the same one on the same layer slots. So the layers of a job are
cut into runs until those of different stages have equal slots or none in common; one part of a
program then serves several stages, and no layer is read or written twice.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdjax.core.kv_layout import KVLayout


@dataclass(frozen=True)
class Run:
    """Consecutive layers that lie in one stage of the source and in one of the target."""

    layers: range
    source_stage: int
    source_slots: range
    target_stage: int
    target_slots: range

    def cut(self, source_edges: set[int], target_edges: set[int]) -> Iterable["Run"]:
        """Cut the run at the edges, so that no part has one inside."""
        starts = [
            i
            for i in range(len(self.layers))
            if i == 0
            or self.source_slots.start + i in source_edges
            or self.target_slots.start + i in target_edges
        ]
        for start, stop in zip(starts, [*starts[1:], len(self.layers)], strict=True):
            yield Run(
                self.layers[start:stop],
                self.source_stage,
                self.source_slots[start:stop],
                self.target_stage,
                self.target_slots[start:stop],
            )


@dataclass(frozen=True)
class Route:
    """The runs of a transfer job, in the order of their layers.

    Attributes:
      runs: all of them.
      source_parts: the slots that runs are read from, each range once; disjoint.
      target_parts: the slots that runs are written to, likewise.
    """

    runs: tuple[Run, ...]
    source_parts: tuple[range, ...]
    target_parts: tuple[range, ...]

    @classmethod
    def of(cls, source: KVLayout, target: KVLayout, layers: range) -> "Route":
        """The route of `layers`, at least one of them."""
        assert layers and range(source.num_layers)[layers.start : layers.stop] == layers, layers
        runs = _whole_runs(source, target, layers)
        while True:
            source_edges = _edges([run.source_slots for run in runs])
            target_edges = _edges([run.target_slots for run in runs])
            cut = [part for run in runs for part in run.cut(source_edges, target_edges)]
            if len(cut) == len(runs):
                break
            runs = cut  # a cut at one end may be a new edge at the other
        return cls(
            tuple(runs),
            tuple(dict.fromkeys(run.source_slots for run in runs)),
            tuple(dict.fromkeys(run.target_slots for run in runs)),
        )


def _whole_runs(source: KVLayout, target: KVLayout, layers: range) -> list[Run]:
    """Cut `layers` where the stage changes, on either side."""
    runs = []
    for source_stage, sent in enumerate(source.stage_layers):
        for target_stage, received in enumerate(target.stage_layers):
            first = max(layers.start, sent[0], received[0])
            stop = min(layers.stop, sent[-1] + 1, received[-1] + 1)
            if first < stop:
                source_slots = range(first - sent[0], stop - sent[0])
                target_slots = range(first - received[0], stop - received[0])
                runs.append(
                    Run(range(first, stop), source_stage, source_slots, target_stage, target_slots)
                )
    return runs


def _edges(slots: Sequence[range]) -> set[int]:
    return {edge for run in slots for edge in (run.start, run.stop)}
