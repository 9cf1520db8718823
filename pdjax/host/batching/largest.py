"""The largest steps that an engine may be given, of padding alone: the programs that compute them
take more memory than those of all others."""

from collections.abc import Collection

from pdjax.config import Config
from pdjax.core.kv_layout import KVLayout
from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.decode_pipeline import DecodePipeline
from pdjax.host.batching.prefill_batch import empty_prefill_batch
from pdjax.interfaces.steps import DecodeStep, MixedStep, PrefillStep, Step, StepKind


def largest_steps(
    config: Config, layout: KVLayout, kinds: Collection[StepKind], context: int
) -> list[Step]:
    """The largest step of each kind.

    Args:
      config: its budgets and buckets.
      layout: of the engine's pool.
      kinds: that the engine accepts.
      context: tokens of the longest sequence.
    """
    prefills, decodes = StepKind.PREFILL in kinds, StepKind.DECODE in kinds
    buckets = Buckets.of(
        config.prefill if prefills else None,
        config.decode if decodes else None,
        layout.page_size,
        context,
    )
    steps: list[Step] = []
    if prefills:
        *_, largest = buckets.prefill_shapes()
        # The one with a history chooses tokens by programs of its own.
        for history in (False, True):
            steps.append(PrefillStep(empty_prefill_batch(buckets, *largest, history=history)))
    if decodes:
        rows = DecodePipeline(layout.stages, config.decode.rows, buckets)
        *_, widest = rows.shapes()
        steps.append(DecodeStep(rows.idle_tick(*widest)))
        if StepKind.MIXED in kinds:
            *_, most = buckets.mixed_chunks()
            *_, widest = rows.mixed_shapes()
            chunks = empty_prefill_batch(buckets, *most)
            steps.append(MixedStep(chunks, rows.idle_tick(*widest)))
    return steps
