"""What does the host cost a decode step?

The coordinator drives engines that answer at once, so that a step's whole time is the
coordinator's. Requests are greedy with random token ids; there is no tokenizer; every row is taken.
A real engine adds the time to dispatch its program, which lookahead can hide behind the step that
runs.

  python -m experiments.bench_host
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from absl import flags

from experiments.tables import number, table
from pdjax.config import Config, DecodeConfig, PrefillConfig
from pdjax.core.clock import WallClock
from pdjax.core.kv_layout import KVLayout
from pdjax.core.request import Request, SamplingParams
from pdjax.flags import new_flags, run
from pdjax.host.coordinator import Coordinator
from pdjax.host.metrics.recorder import Recorder
from pdjax.interfaces.batches import DecodeBatch, PrefillBatch, Sampled
from pdjax.interfaces.tickets import Ticket
from pdjax.interfaces.transfer import End, Shipment, TransferCost

VOCAB = 128256

FLAGS = new_flags()
_ROWS = flags.DEFINE_multi_integer("rows", [8, 64, 256], "rows that decode", flag_values=FLAGS)
_STAGES = flags.DEFINE_integer("stages", 1, "stages of the decode engine", flag_values=FLAGS)
_STEPS = flags.DEFINE_integer("steps", 300, "decode steps a number", flag_values=FLAGS)
_PROMPT = flags.DEFINE_integer("prompt", 64, "tokens of a prompt", flag_values=FLAGS)


@dataclass(frozen=True)
class Done:
    """A ticket that is always ready."""

    outcome: Sampled

    def ready(self) -> bool:
        return True

    def result(self) -> Sampled:
        return self.outcome


class InstantEngine:
    """A prefill and decode engine that returns meaningless tokens at once."""

    def __init__(self, layout: KVLayout, num_pages: int, rows: int) -> None:
        self.layout, self.num_pages = layout, num_pages
        self.layer_groups: tuple[range, ...] = (range(layout.num_layers),)
        tokens = np.random.default_rng(0).integers(1, VOCAB, rows, dtype=np.int32)
        nothing = np.zeros(rows, np.float32), np.zeros((rows, 0), np.int32)
        self._done = Done(Sampled(tokens, *nothing, np.zeros((rows, 0), np.float32)))

    def prefill(
        self, batch: PrefillBatch, after_group: Callable[[int], None] | None = None
    ) -> Done:
        del batch, after_group
        return self._done

    def tick(self, batch: DecodeBatch) -> Done:
        del batch
        return self._done

    def remember(self, row: int, token_ids: np.ndarray) -> None:
        raise AssertionError("no request is penalized")

    @property
    def losses(self) -> int:
        return 0

    def close(self) -> None:
        """There is nothing to let go."""


class OnePool:
    """A transfer for prefill and decode with one pool, where no page moves."""

    def shares_pool(self, source: End, target: End) -> bool:
        return source.engine == target.engine

    def send(self, shipment: Shipment) -> "NoTicket":
        raise AssertionError("nothing moves")

    def land(self, ticket: object, target_pages: object) -> Ticket[int]:
        raise AssertionError("nothing moves")

    def probe(self, source: End, target: End, nbytes: int) -> float:
        raise AssertionError("there is no link")

    def close(self) -> None:
        """There is nothing to let go."""


class NoTicket:
    """The return type of `OnePool.send`, which never makes one."""

    shipment: Shipment

    def gathered(self) -> bool:
        raise AssertionError("nothing moves")

    def ready(self) -> bool:
        raise AssertionError("nothing moves")

    def result(self) -> TransferCost:
        raise AssertionError("nothing moves")


def make_coordinator(rows: int, stages: int, longest: int) -> Coordinator:
    """Make a coordinator that serves `rows` sequences, on engines that take no time."""
    layout = KVLayout.of_heads(stages, 1, 2, 16, "float32", 4, stages)
    engine = InstantEngine(layout, 1 + rows * (longest // 16 + 2), rows)
    clock = WallClock()
    return Coordinator(
        Config(
            prefill=PrefillConfig(token_budget=longest),
            decode=DecodeConfig(rows=rows, stages=stages),
        ),
        vocab_size=VOCAB,
        max_model_len=longest,
        end_token_ids=[0],
        prefill_engines=[engine],
        decode_engines=[engine],
        transfer=OnePool(),
        clock=clock,
        recorder=Recorder(clock),
    )


def decoding(rows: int, stages: int, prompt: int, steps: int) -> Coordinator:
    """Make a coordinator in which every row decodes, and will for `steps` more steps."""
    # A few prompts are prefilled a step; the first ones decode while the others are prefilled.
    coordinator = make_coordinator(rows, stages, prompt + rows + steps)
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    ids = np.random.default_rng(1).integers(1, VOCAB, (rows, prompt)).tolist()
    waiting = [
        sequence
        for row in range(rows)
        for sequence in coordinator.submit(Request(f"r{row}", tuple(ids[row]), params, 0.0))
    ]
    while waiting:
        coordinator.step()
        waiting = [sequence for sequence in waiting if len(sequence.output) < 2]
    return coordinator


def step_seconds(coordinator: Coordinator, steps: int) -> list[float]:
    """Return the sorted times of steps that each read one tick and dispatch one."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        coordinator.step()
        times.append(time.perf_counter() - start)
    return sorted(times)


def main() -> None:
    """Measure and print; see the module."""
    stages, prompt, steps = _STAGES.value or 1, _PROMPT.value or 1, _STEPS.value or 1
    rows = []
    for count in _ROWS.value or ():
        times = step_seconds(decoding(count, stages, prompt, steps), steps)
        median, least = statistics.median(times), times[0]
        rows.append([str(count), number(median * 1e6, 0), number(least * 1e6, 0)])
    print(table(["rows", "host, us/step", "least"], rows))


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
