"""What does the host cost a decode step?

The coordinator drives engines that answer at once, so that a step's whole time is the
coordinator's. Requests are greedy with random token ids; there is no tokenizer; every row is taken.
A real engine adds the time to dispatch its program, which lookahead can hide behind the step that
runs.

Then it drives simulated engines whose rows are all taken while requests wait: for each that begins
another one comes. All that the host does between two ticks counts, prefill and hand-offs too, but
not what the simulation takes. Orders, admission and router are flags.

Prompts differ from their first page on, so that a prefix cache finds none: what it costs is what
`--noprefix_cache` leaves out.

  python -m experiments.bench_host
  python -m experiments.bench_host --noprefix_cache
  python -m experiments.bench_host --rows=256 --prefill=fair --admission=early_rejection
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from absl import flags

from experiments.bench_host.waiting import Situation, measure, waiting_table
from experiments.common.origin import commit, save
from experiments.common.tables import number, table
from pdjax.config import Config, DecodeConfig, KVConfig, PoliciesConfig, PrefillConfig
from pdjax.core.clock import WallClock
from pdjax.core.ids import EngineId, PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.core.request import Request, SamplingParams
from pdjax.flags import new_flags, run
from pdjax.host.coordinator import Coordinator
from pdjax.host.events import PolledEvents
from pdjax.host.metrics.recorder import Recorder
from pdjax.interfaces.batches import Sampled
from pdjax.interfaces.engine import StepTicket
from pdjax.interfaces.steps import Step, StepKind
from pdjax.interfaces.tickets import Ticket
from pdjax.interfaces.transport import TransferJob, TransferTicket

VOCAB = 128256

FLAGS = new_flags()
_ROWS = flags.DEFINE_multi_integer("rows", [8, 64, 256], "rows that decode", flag_values=FLAGS)
_STAGES = flags.DEFINE_integer("stages", 1, "stages of the decode engine", flag_values=FLAGS)
_STEPS = flags.DEFINE_integer("steps", 300, "decode steps a number", flag_values=FLAGS)
_PROMPT = flags.DEFINE_integer("prompt", 64, "tokens of a prompt", flag_values=FLAGS)
_WAITING = flags.DEFINE_multi_integer(
    "waiting",
    [0, 1_000, 10_000, 50_000],
    "requests that wait while simulated engines decode",
    flag_values=FLAGS,
)
_ENGINES = flags.DEFINE_integer(
    "engines", 8, "simulated engines of each kind, of the last of --rows", flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_integer("output", 512, "mean tokens of an answer there", flag_values=FLAGS)
_LONG = flags.DEFINE_integer("long", 256, "tokens of a prompt there", flag_values=FLAGS)
_TICKS = flags.DEFINE_integer("ticks", 2_000, "decode steps there", flag_values=FLAGS)
_RUNS = flags.DEFINE_integer(
    "runs", 3, "equal runs there, see `waiting.measure`", flag_values=FLAGS
)
_PREFIX = flags.DEFINE_bool("prefix_cache", True, "keep and look up prefixes", flag_values=FLAGS)
_POLICIES = {
    role: flags.DEFINE_string(role, getattr(PoliciesConfig(), role), text, flag_values=FLAGS)
    for role, text in (
        ("prefill", "prefill policy there"),
        ("decode", "decode policy there"),
        ("router", "router there"),
        ("admission", "admission policy there"),
    )
}
_OUT = flags.DEFINE_string("out", None, "JSON file for what was measured", flag_values=FLAGS)


@dataclass(frozen=True)
class Done:
    """A ticket that is always ready."""

    outcome: Sampled
    exports: Mapping[int, TransferTicket] = field(default_factory=dict)
    made: bool = True

    def ready(self) -> bool:
        return True

    def result(self) -> Sampled:
        return self.outcome


POOL = PoolId("hbm/0")
"""The pool of both engines."""


class InstantEngine:
    """An engine whose steps are done at once, with arbitrary tokens.

    Args:
      kind: of its steps.
      layout, num_pages: of the pool.
      rows: of decode.
      tokens: that come back, between two bounds.

    Attributes:
      sampled: what every step gives.
    """

    def __init__(
        self,
        kind: StepKind,
        layout: KVLayout,
        num_pages: int,
        rows: int,
        tokens: tuple[int, int] = (1, VOCAB),
    ) -> None:
        self.id, self.pool = EngineId(f"{kind.value}/0"), POOL
        self.layout, self.num_pages = layout, num_pages
        self.accepts = frozenset({kind})
        self.rows = rows if kind is StepKind.DECODE else 0
        self.layer_groups: tuple[range, ...] = (range(layout.num_layers),)
        drawn = np.random.default_rng(0).integers(*tokens, rows, dtype=np.int32)
        nothing = np.zeros(rows, np.float32), np.zeros((rows, 0), np.int32)
        self.sampled = Sampled(drawn, *nothing, np.zeros((rows, 0), np.float32))
        self._done = Done(self.sampled)

    def compile(self, step: Step) -> Ticket[None]:
        raise AssertionError("nothing is compiled")

    def submit(self, step: Step) -> StepTicket:
        del step
        return self._done

    def feed(self, row: int, step: StepTicket, index: int) -> None:
        raise AssertionError("no KV moves")

    def set_history(self, row: int, token_ids: np.ndarray) -> None:
        raise AssertionError("no request has penalties")

    @property
    def losses(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing is held."""


class NoTransport:
    """A transport that never moves a page: both engines share one pool."""

    def connects(self, source: PoolId, target: PoolId) -> bool:
        return False

    def writes_ahead(self, source: PoolId, target: PoolId) -> bool:
        return False

    def compile(self, job: TransferJob, target_pages: np.ndarray) -> Ticket[None]:
        raise AssertionError("nothing moves")

    def send(self, job: TransferJob) -> TransferTicket:
        raise AssertionError("nothing moves")

    def write(self, job_id: int, target_pages: np.ndarray) -> Ticket[int]:
        raise AssertionError("nothing moves")

    def cancel(self, job_id: int) -> None:
        """No job was sent."""

    def measure(self, source: PoolId, target: PoolId, nbytes: int) -> Ticket[float]:
        raise AssertionError("there is no link")

    def close(self) -> None:
        """Nothing is held."""


def make_coordinator(rows: int, stages: int, longest: int, prefix_cache: bool) -> Coordinator:
    """Make a coordinator that serves `rows` sequences on engines that take no time."""
    layout = KVLayout.of_heads(
        stages, 1, 2, page_size=16, dtype="float32", itemsize=4, stages=stages
    )
    pages = 1 + rows * (longest // 16 + 2)
    clock = WallClock()
    return Coordinator(
        Config(
            kv=KVConfig(prefix_cache=prefix_cache),
            prefill=PrefillConfig(token_budget=longest),
            decode=DecodeConfig(rows=rows, stages=stages),
        ),
        vocab_size=VOCAB,
        max_model_len=longest,
        end_token_ids=[0],
        engines=[
            InstantEngine(kind, layout, pages, rows) for kind in (StepKind.PREFILL, StepKind.DECODE)
        ],
        transport=NoTransport(),
        events=PolledEvents(clock),
        clock=clock,
        recorder=Recorder(clock),
    )


def decoding(
    rows: int, stages: int, prompt: int, steps: int, prefix_cache: bool = True
) -> Coordinator:
    """Make a coordinator in which every row decodes, and will for `steps` more steps."""
    # A few prompts are prefilled a step; the first ones decode while the others are prefilled.
    coordinator = make_coordinator(rows, stages, prompt + rows + steps, prefix_cache)
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
        keeps = bool(_PREFIX.value)
        times = step_seconds(decoding(count, stages, prompt, steps, keeps), steps)
        median, least = statistics.median(times), times[0]
        rows.append([str(count), number(median * 1e6, 0), number(least * 1e6, 0)])
    print(table(["rows", "host, us/step", "least"], rows))
    policies = PoliciesConfig(**{role: flag.value for role, flag in _POLICIES.items()})
    found = [
        measure(
            Situation(
                engines=_ENGINES.value or 1,
                rows=(_ROWS.value or [1])[-1],
                waiting=waiting,
                prompt=_LONG.value or 2,
                output=_OUTPUT.value or 2,
                policies=policies,
                prefix_cache=bool(_PREFIX.value),
            ),
            _TICKS.value or 1,
            _RUNS.value or 1,
        )
        for waiting in _WAITING.value or ()
    ]
    if found:
        print(waiting_table(found))
    if _OUT.value:
        machine = {"cores": os.cpu_count(), "python": platform.python_version()}
        command = ["bench_host", *(each for each in sys.argv[1:] if not each.startswith("--out="))]
        save(
            {"commit": commit(), "command": command, "machine": machine, "waiting": found},
            _OUT.value,
        )


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
