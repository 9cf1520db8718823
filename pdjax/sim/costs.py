"""What a step costs, in seconds; constants, as they are measured of a real engine."""

from dataclasses import dataclass, fields

import numpy as np

from pdjax.interfaces.batches import DecodeBatch, PrefillBatch


@dataclass(frozen=True)
class StepCosts:
    """Seconds that steps take on a mesh, as sums of constants.

    A subclass may work them out otherwise, as from a roofline.

    Attributes:
      prefill_step: of each prefill step.
      prefill_token: of each token that a prefill step computes; padding is free.
      prefill_kv_token: of each token of KV that a prefill step reads for a sequence.
      tick: of each decode tick.
      tick_row: of each active row under a stage, averaged over the stages.
      tick_kv_token: of each token of KV under a stage, averaged over the stages.
      write: of the writing of one transfer job, on the mesh that keeps the target's pages.

    Raises:
      ValueError: a negative cost.
    """

    prefill_step: float = 0.0
    prefill_token: float = 1 / 44_000
    prefill_kv_token: float = 0.0
    tick: float = 7e-3
    tick_row: float = 0.0
    tick_kv_token: float = 0.0
    write: float = 50e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 0:
                value = getattr(self, field.name)
                raise ValueError(f"{field.name}={value}: must be a number of seconds, 0 or more")

    def prefill_seconds(self, batch: PrefillBatch) -> float:
        """Of a prefill step, over all layer groups."""
        seconds = self.prefill_step + int(batch.cu_q_lens[-1]) * self.prefill_token
        if self.prefill_kv_token:
            seconds += int(batch.kv_lens.sum()) * self.prefill_kv_token
        return seconds

    def mixed_seconds(self, chunks: PrefillBatch, rows: DecodeBatch) -> float:
        """Of chunks and rows together: the weights are read once, while the chunks are computed,
        and each active row is a token more to compute."""
        active = int((np.asarray(rows.positions) >= 0).sum())
        alone = self.tick_seconds(rows)
        computing = self.prefill_seconds(chunks) + active * self.prefill_token
        return max(self.tick, computing) + alone - self.tick

    def tick_seconds(self, batch: DecodeBatch) -> float:
        """Of a decode tick."""
        if not self.tick_row and not self.tick_kv_token:
            return self.tick
        positions = np.asarray(batch.positions)  # [R, n]
        active = positions >= 0
        rows, tokens = int(active.sum()), int((positions + 1)[active].sum())
        return self.tick + (rows * self.tick_row + tokens * self.tick_kv_token) / len(positions)
