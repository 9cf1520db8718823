"""Drives the engines of an LLM directly, without a coordinator: the floor of served times."""

import time
from collections.abc import Sequence as Seq

from pdjax import LLM, SamplingParams
from pdjax.core.request import Request
from pdjax.host.batching.chunks import Chunk
from pdjax.host.batching.decode_pipeline import Pipeline
from pdjax.host.batching.prefill_batch import prefill_batch
from pdjax.host.sequences.sequence import Sequence


class Bare:
    """The first prefill and the first decode engine of an LLM that has no requests meanwhile.

    Args:
      llm: owner of the engines; all its pages may be overwritten.
      steps: decode steps of a round.
    """

    def __init__(self, llm: LLM, steps: int) -> None:
        self._llm, self._steps = llm, steps
        self._buckets = llm.coordinator.buckets

    def prefill(self, prompt: Seq[int]) -> None:
        """Run one step over one prompt, until its next token is on the host."""
        chunk = Chunk(self._sequence(prompt, 0), 0, len(prompt))
        self._llm.prefill_engines[0].prefill(prefill_batch([chunk], self._buckets)).result()

    def decode(self, prompts: Seq[Seq[int]]) -> float:
        """Run all steps of a round; each tick is dispatched before the last tick's tokens are read.

        Returns the mean gap in seconds from one step's tokens on the host to the next step's. A
        sequence has the same gaps in a served run.
        """
        engine = self._llm.decode_engines[0]
        stages = engine.layout.stages
        pipeline = Pipeline(stages, self._llm.config.decode.rows, self._buckets)
        for number, prompt in enumerate(prompts):
            sequence = self._sequence(prompt, number)
            sequence.output.append(prompt[0])  # stands for the token that prefill would choose
            pipeline.seat(pipeline.reserve(), sequence)
        in_flight, moments = None, []
        for _ in range(self._steps * stages):
            assert pipeline.active, "no row is active"
            ticket = engine.tick(pipeline.tick().batch)
            if in_flight is not None:
                in_flight.result()
                moments.append(time.perf_counter())
            in_flight = ticket
        if in_flight is not None:
            in_flight.result()
            moments.append(time.perf_counter())
        gaps = max(1, len(moments) - 1)
        return (moments[-1] - moments[0]) / gaps * stages

    def _sequence(self, prompt: Seq[int], number: int) -> Sequence:
        """Make a sequence with its own pages for the whole round."""
        request = Request(f"bare-{number}", tuple(prompt), SamplingParams(temperature=0.0), 0.0)
        pages = self._buckets.pages_for(len(prompt) + self._steps)
        first = 1 + number * pages
        return Sequence(
            request,
            choice=0,
            seed=0,
            max_new_tokens=self._steps + 1,
            pages=list(range(first, first + pages)),
        )
