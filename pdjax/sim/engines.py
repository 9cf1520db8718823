"""Simulated engines: every step takes the time that a cost model gives it, and no device."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache

import numpy as np

from pdjax.core.clock import VirtualClock
from pdjax.core.ids import EngineId
from pdjax.interfaces.batches import (
    Array,
    DecodeBatch,
    Masks,
    PrefillBatch,
    Sampled,
    Scores,
    joined,
)
from pdjax.interfaces.engine import StepTicket
from pdjax.interfaces.steps import DecodeStep, MixedStep, PrefillStep, Step, StepKind
from pdjax.interfaces.transport import TransferJob, TransferTicket
from pdjax.sim.costs import StepCosts
from pdjax.sim.links import SimTransport
from pdjax.sim.meshes import SimMesh
from pdjax.sim.tickets import SimTicket
from pdjax.sim.tokens import allowed_tokens, token_at


class SimStepTicket(SimTicket[Sampled]):
    """A step in flight.

    Attributes:
      exports: the transfers that leave during the step, by their jobs' ids.
      made: always.
    """

    __slots__ = ("exports", "made")

    def __init__(
        self,
        clock: VirtualClock,
        moment: float,
        sampled: Sampled,
        exports: Mapping[int, TransferTicket],
    ) -> None:
        super().__init__(clock, moment, sampled)
        self.exports, self.made = exports, True


_NO_EXPORTS: Mapping[int, TransferTicket] = {}


class SimEngine:
    """An engine without devices behind `interfaces.engine.Engine`.

    A step takes the time of its mesh, after everything that this has been asked before; the layer
    groups of a prefill step share its time by their numbers of layers, and what a group exports
    leaves when it has been computed. The token that is chosen at a position of a sequence is a
    function of the sequence's seed and of the position, so that it does not depend on batching,
    placement or preemption: see `token_at`. Of what a request asks, masks alone change it.

    Args:
      id: its name.
      mesh: whose time it takes and whose pool it uses.
      transport: sends what steps export.
      accepts: the kinds of step.
      rows: of decode; 0 where it accepts no decode step.
      layer_groups: global layers that a prefill step computes in one go; None is one group.
      costs: seconds of steps.
      vocab_size: tokens that are chosen are in [1, vocab_size).

    Raises:
      ValueError: rows or layer groups that do not fit.
    """

    def __init__(
        self,
        id: EngineId,
        mesh: SimMesh,
        transport: SimTransport,
        *,
        accepts: Iterable[StepKind],
        rows: int = 0,
        layer_groups: tuple[range, ...] | None = None,
        costs: StepCosts = StepCosts(),  # noqa: B008 - a frozen value
        vocab_size: int = 1000,
    ) -> None:
        self.id, self.pool = id, mesh.pool
        self.layout, self.num_pages = mesh.layout, mesh.num_pages
        self.accepts, self.rows = frozenset(accepts), rows
        self.layer_groups = layer_groups or (range(self.layout.num_layers),)
        self._mesh, self._transport = mesh, transport
        self._costs, self._vocab_size = costs, vocab_size
        self._check()

    def _check(self) -> None:
        layers = [layer for group in self.layer_groups for layer in group]
        if layers != list(range(self.layout.num_layers)):
            raise ValueError(
                f"layer_groups={self.layer_groups}: must be the {self.layout.num_layers} layers "
                "of the model, in order"
            )
        if (self.rows > 0) != (StepKind.DECODE in self.accepts) or self.rows % self.layout.stages:
            raise ValueError(
                f"rows={self.rows}: must be a positive multiple of the {self.layout.stages} stages "
                "where decode steps are accepted, and 0 elsewhere"
            )
        if self._vocab_size < 2:
            raise ValueError(f"vocab_size={self._vocab_size}: must be at least 2")

    @property
    def losses(self) -> int:
        return self._mesh.losses

    def compile(self, step: Step) -> SimTicket[None]:
        """There is nothing to compile."""
        return SimTicket(self._mesh.clock, self._mesh.clock.now(), None)

    def submit(self, step: Step) -> SimStepTicket:
        if step.kind not in self.accepts:
            accepted = ", ".join(sorted(kind.value for kind in self.accepts))
            raise ValueError(
                f"step: {self.id} was given one of {step.kind.value}; allowed are {accepted}"
            )
        match step:
            case PrefillStep():
                ticket = self._prefill(step)
            case DecodeStep(batch):
                ticket = self._tick(batch)
            case MixedStep(chunks, rows):
                ticket = self._mixed(chunks, rows)
        self._mesh.promise(ticket)
        return ticket

    def set_history(self, row: int, token_ids: Array) -> None:
        if not 0 <= row < self.rows:
            raise ValueError(f"row={row}: must be in [0, {self.rows})")

    def feed(self, row: int, step: StepTicket, index: int) -> None:
        if not 0 <= row < self.rows:
            raise ValueError(f"row={row}: must be in [0, {self.rows})")
        assert isinstance(step, SimStepTicket), "a step of a simulated engine"
        self._mesh.wait_for(step.moment)

    def lose(self) -> None:
        """Lose the mesh, and with it all that engines of the same pool keep there."""
        self._mesh.lose()

    def close(self) -> None:
        """There is nothing to let go."""

    def _prefill(self, step: PrefillStep) -> SimStepTicket:
        batch, groups = step.batch, self.layer_groups
        if step.exports and len(step.exports) != len(groups):
            raise ValueError(
                f"exports: of {len(step.exports)} layer groups; {self.id} has {len(groups)}"
            )
        seconds = self._costs.prefill_seconds(batch)
        exports = dict[int, TransferTicket]()
        for group, jobs in zip(groups, step.exports or ((),) * len(groups), strict=True):
            self._mesh.take(seconds * len(group) / self.layout.num_layers)
            for job in jobs:
                self._check_export(job, group)
                exports[job.id] = self._transport.send(job)
        return SimStepTicket(self._mesh.clock, self._mesh.free, self._of_chunks(batch), exports)

    def _of_chunks(self, batch: PrefillBatch) -> Sampled:
        tokens = self._choose(batch.sampling.seed, batch.kv_lens, batch.masks)
        sampled = self._sampled(tokens)
        if batch.scored is None:
            return sampled
        chosen, top_ids, top = _logprobs(len(batch.scored.targets), self._vocab_size)
        ranks = np.ones(len(chosen), np.int32)
        return replace(sampled, scores=Scores(chosen, ranks, top_ids, top))

    def _mixed(self, chunks: PrefillBatch, rows: DecodeBatch) -> SimStepTicket:
        moment = self._mesh.take(self._costs.mixed_seconds(chunks, rows))
        sampled = joined(self._of_chunks(chunks), self._of_rows(rows))
        return SimStepTicket(self._mesh.clock, moment, sampled, _NO_EXPORTS)

    def _check_export(self, job: TransferJob, group: range) -> None:
        if job.source != self.pool:
            raise ValueError(f"exports: job {job.id} reads {job.source}; must be {self.pool}")
        if job.layers and not (group[0] <= job.layers[0] and job.layers[-1] <= group[-1]):
            raise ValueError(
                f"exports: job {job.id} reads layers {job.layers}; must be among {group}"
            )

    def _tick(self, batch: DecodeBatch) -> SimStepTicket:
        moment = self._mesh.take(self._costs.tick_seconds(batch))
        return SimStepTicket(self._mesh.clock, moment, self._of_rows(batch), _NO_EXPORTS)

    def _of_rows(self, batch: DecodeBatch) -> Sampled:
        # The input of the last stage stands at a position; what is chosen will stand at the next.
        seeds = batch.sampling.seed[batch.leaving_places]
        return self._sampled(self._choose(seeds, batch.positions[-1] + 1, batch.masks))

    def _choose(self, seeds: np.ndarray, positions: np.ndarray, masks: Masks | None) -> np.ndarray:
        tokens = token_at(seeds, positions, self._vocab_size)
        return tokens if masks is None else allowed_tokens(tokens, masks.rows, masks.bits)

    def _sampled(self, tokens: np.ndarray) -> Sampled:
        """Every token is as likely as any other; no alternatives are reported."""
        return Sampled(tokens, *_logprobs(len(tokens), self._vocab_size))


@cache
def _logprobs(rows: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    arrays = (
        np.full(rows, -np.log(vocab_size - 1), np.float32),
        np.zeros((rows, 0), np.int32),
        np.zeros((rows, 0), np.float32),
    )
    for array in arrays:
        array.flags.writeable = False
    return arrays
