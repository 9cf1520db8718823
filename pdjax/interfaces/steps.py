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


Copies = tuple[tuple[int, int], ...]
"""Pages of an engine's pool, each with the page that it is copied to, of which none comes twice.
All are read before any is written, and before the step computes anything."""


@dataclass(frozen=True)
class PrefillStep:
    """Chunks of prompts.

    Attributes:
      batch: what is computed.
      exports: [layer group] KV that leaves once the group's programs have been dispatched, while
        the groups after it compute. Each job reads the engine's own pool and no more than the
        layers of its group. Empty where nothing leaves.
      copies: pages that are copied first; at most as many as the batch has rows.
    """

    batch: PrefillBatch
    exports: Exports = ()
    copies: Copies = ()

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
      copies: pages that are copied first; at most as many as the chunks have rows.
    """

    chunks: PrefillBatch
    rows: DecodeBatch
    copies: Copies = ()

    @property
    def kind(self) -> StepKind:
        return StepKind.MIXED


Step = PrefillStep | DecodeStep | MixedStep
