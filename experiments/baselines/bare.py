"""Drives the engines of an LLM directly, without a coordinator: the floor of served times."""

import time
from collections.abc import Sequence as Seq

from experiments.common.llm_engines import DECODE, PREFILL, engines_of
from pdjax import LLM, SamplingParams
from pdjax.core.request import Request
from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.chunks import Chunk
from pdjax.host.batching.decode_pipeline import DecodePipeline
from pdjax.host.batching.prefill_batch import prefill_batch
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.steps import DecodeStep, PrefillStep


class Bare:
    """The first prefill and the first decode engine of an LLM that serves no request meanwhile.

    Args:
      llm: owner of the engines; all its pages may be overwritten.
      steps: decode steps of a round.
    """

    def __init__(self, llm: LLM, steps: int) -> None:
        self._steps = steps
        [self._prefill, *_], [self._decode, *_] = (
            engines_of(llm, kind) for kind in (PREFILL, DECODE)
        )
        config, longest = llm.config, llm.max_model_len
        size = self._prefill.layout.page_size
        self._prefill_buckets = Buckets.of(config.prefill, None, size, longest)
        size = self._decode.layout.page_size
        self._decode_buckets = Buckets.of(None, config.decode, size, longest)

    def prefill(self, prompt: Seq[int]) -> None:
        """Run one step over one prompt, until its next token is on the host."""
        chunk = Chunk(self._sequence(prompt, 0, self._prefill_buckets), 0, len(prompt))
        batch = prefill_batch([chunk], self._prefill_buckets)
        self._prefill.submit(PrefillStep(batch)).result()

    def decode(self, prompts: Seq[Seq[int]]) -> float:
        """Run all steps of a round. Each tick is dispatched before the last tick's tokens are read.

        Returns the mean gap in seconds from one step's tokens on the host to the next step's. A
        sequence has the same gaps in a served run.
        """
        engine = self._decode
        stages = engine.layout.stages
        pipeline = DecodePipeline(stages, engine.rows, self._decode_buckets)
        for number, prompt in enumerate(prompts):
            sequence = self._sequence(prompt, number, self._decode_buckets)
            sequence.output.append(prompt[0])  # as if prefill had chosen it
            pipeline.assign(pipeline.reserve(), sequence)
        in_flight, moments = None, []
        for _ in range(self._steps * stages):
            assert pipeline.active, "every row would be idle"
            ticket = engine.submit(DecodeStep(pipeline.tick().batch))
            if in_flight is not None:
                in_flight.result()
                moments.append(time.perf_counter())
            in_flight = ticket
        if in_flight is not None:
            in_flight.result()
            moments.append(time.perf_counter())
        gaps = max(1, len(moments) - 1)
        return (moments[-1] - moments[0]) / gaps * stages

    def _sequence(self, prompt: Seq[int], number: int, buckets: Buckets) -> Sequence:
        """Make a sequence that holds pages of its own for the whole round."""
        request = Request(f"bare-{number}", tuple(prompt), SamplingParams(temperature=0.0), 0.0)
        pages = buckets.pages_for(len(prompt) + self._steps)
        first = 1 + number * pages
        return Sequence(
            request,
            choice=0,
            seed=0,
            max_new_tokens=self._steps + 1,
            pages=list(range(first, first + pages)),
        )
