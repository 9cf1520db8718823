"""A step, as data: everything that an engine is asked to compute in one go.

A step is plain, so that it can cross the boundary of a process.
"""

import enum
from dataclasses import dataclass

from pdjax.interfaces.batches import DecodeBatch, PrefillBatch
from pdjax.interfaces.transport import TransferJob


class StepKind(enum.Enum):
    """What an engine may be asked for."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


Exports = tuple[tuple[TransferJob, ...], ...]
"""Of each layer group of an engine, the transfers that begin when it has been dispatched."""


@dataclass(frozen=True)
class PrefillStep:
    """Chunks of prompts.

    Attributes:
      batch: what is computed.
      exports: [layer group] KV that leaves once the group's programs have been dispatched, while
        the groups after it compute. Each job reads the engine's own pool and no more than the
        layers of its group. Empty where nothing leaves.
    """

    batch: PrefillBatch
    exports: Exports = ()

    @property
    def kind(self) -> StepKind:
        return StepKind.PREFILL


@dataclass(frozen=True)
class DecodeStep:
    """One tick of a decode pipeline; see `DecodeBatch`."""

    batch: DecodeBatch

    @property
    def kind(self) -> StepKind:
        return StepKind.DECODE


@dataclass(frozen=True)
class MixedStep:
    """Chunks of prompts and a tick of one stage, computed together: each weight is read once for
    both. Its tokens are those of the chunks, B of them, and then those of the tick, n.

    Attributes:
      chunks: of sequences that have no row.
      rows: the tick, of an engine of one stage.
    """

    chunks: PrefillBatch
    rows: DecodeBatch

    @property
    def kind(self) -> StepKind:
        return StepKind.MIXED


Step = PrefillStep | DecodeStep | MixedStep
