"""Runs every implementation over every case on the hardware at hand; exits with 1 if one is wrong.

    python -m pallas_kernels.check [--only=SUBSTRING] [--seed=N] [--nolarge]

One line a case and implementation: the largest error in units of the largest expected number.
Inputs are fresh random numbers in scattered pages; memory that no operation may read is NaN. Every
run is repeated and must give the same bits. Small cases also run with poisoned rows, which must
change no bit of the other rows. Accelerators also run the large cases and time them: one call
inside a compiled loop, and the rate at which it read KV, computed, or moved bytes.
"""

import sys
import timeit
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import jax
import numpy as np
from absl import app, flags
from jax import lax

from pallas_kernels.add_rms import api as add_api
from pallas_kernels.add_rms import cases as add_cases
from pallas_kernels.errors import (
    LIMITS,
    SWIGLU_LIMITS,
    add_error,
    append_error,
    attention_error,
    gather_error,
    grouped_error,
    same_bits,
    scatter_error,
    sum_error,
    swiglu_error,
    write_error,
)
from pallas_kernels.grouped_product import api as grouped_api
from pallas_kernels.grouped_product import cases as grouped_cases
from pallas_kernels.kv_write import api as write_api
from pallas_kernels.kv_write import cases as write_cases
from pallas_kernels.page_copy import api as copy_api
from pallas_kernels.page_copy import cases as gather_cases
from pallas_kernels.page_copy import scatter_cases
from pallas_kernels.paged_attention import api as paged_api
from pallas_kernels.paged_attention import append_cases
from pallas_kernels.paged_attention import cases as paged_cases
from pallas_kernels.poison import VALUES, fault
from pallas_kernels.prefill_attention import api as prefill_api
from pallas_kernels.prefill_attention import cases as prefill_cases
from pallas_kernels.product import add_cases as add_product_cases
from pallas_kernels.product import api as product_api
from pallas_kernels.product import cases as product_cases
from pallas_kernels.swiglu import api as swiglu_api
from pallas_kernels.swiglu import cases as swiglu_cases

_ONLY = flags.DEFINE_string("only", "", "Run the cases whose label contains this.")
_LARGE = flags.DEFINE_bool("large", True, "On accelerators, run and time the large cases, too.")
_SEED = flags.DEFINE_integer("seed", None, "Seed of the inputs; a fresh one if not given.")

_RUNS = 3
_TIMED_SECONDS = 0.05
_HUGE = 1e30  # larger than any input


@dataclass(frozen=True)
class Subject:
    """An operation, how its results are judged, and how timed calls are chained."""

    operation: Callable[..., Any]
    platforms: Mapping[str, tuple[str, ...]]
    """Implementation -> platforms that it runs on."""
    cases: ModuleType
    error: Callable[[Any, Any], float] = attention_error
    """Inputs and outputs -> error."""
    limits: Mapping[str, float] = field(default_factory=LIMITS.copy)
    """Type of a case -> largest allowed error."""
    fed: tuple[int, ...] = (0,)
    """Positions of the operands that a timed call passes on to the next one."""
    feed: Callable[[tuple[Any, ...], Any], tuple[Any, ...]] = lambda fed, out: (out,)
    """Those operands and the outputs -> those operands of the next call."""


def _feed_pools(fed: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pass on the pools, and a scale that depends on the first output: without it XLA would move
    that output's computation out of the loop."""
    first, k_pages, v_pages = outputs
    return fed[0] + 0 * first[:, 0, 0].astype(fed[0].dtype), k_pages, v_pages


def _feed_ids(fed: tuple[Any, ...], out: Any) -> tuple[Any, ...]:
    """Pass on the same ids, made to depend on the output."""
    return (fed[0] + (out[0, :, 0, 0] > _HUGE).astype(fed[0].dtype),)


PAGED = Subject(paged_api.paged_attention, paged_api.PLATFORMS, paged_cases)
PREFILL = Subject(prefill_api.prefill_attention, prefill_api.PLATFORMS, prefill_cases)
WRITE = Subject(
    write_api.rope_and_write,
    write_api.PLATFORMS,
    write_cases,
    error=write_error,
    fed=(1, 5, 6),  # scale, k_pages, v_pages
    feed=_feed_pools,
)
APPEND = Subject(
    paged_api.append_attention,
    paged_api.PLATFORMS,
    append_cases,
    error=append_error,
    fed=(1, 5, 6),  # row_scale, k_pages, v_pages
    feed=_feed_pools,
)
ADD = Subject(
    add_api.add_rms,
    add_api.PLATFORMS,
    add_cases,
    error=add_error,
    feed=lambda fed, out: (out[0],),
)
SWIGLU = Subject(
    swiglu_api.swiglu,
    swiglu_api.PLATFORMS,
    swiglu_cases,
    error=swiglu_error,
    limits=SWIGLU_LIMITS,
    feed=lambda fed, out: (fed[0] + 0 * out[:, :1],),
)
PRODUCT = Subject(
    product_api.product,
    product_api.PLATFORMS,
    product_cases,
    feed=lambda fed, out: (fed[0] + 0 * out[:, :1],),
)
ADD_PRODUCT = Subject(
    product_api.add_product,
    product_api.PLATFORMS,
    add_product_cases,
    error=sum_error,
    feed=lambda fed, out: (out[0] + (0 * out[1][:, None]).astype(out[0].dtype),),
)
GROUPED = Subject(
    grouped_api.grouped_product,
    grouped_api.PLATFORMS,
    grouped_cases,
    error=grouped_error,
    feed=lambda fed, out: (fed[0] + 0 * out[:, :1],),
)
GATHER = Subject(
    copy_api.gather,
    copy_api.PLATFORMS,
    gather_cases,
    error=gather_error,
    fed=(1,),  # page_ids
    feed=_feed_ids,
)
SCATTER = Subject(copy_api.scatter, copy_api.SCATTER_PLATFORMS, scatter_cases, error=scatter_error)
SUBJECTS = (
    *(ADD, WRITE, PRODUCT, ADD_PRODUCT, SWIGLU, GROUPED),
    *(PAGED, APPEND, PREFILL, GATHER, SCATTER),
)


@dataclass(frozen=True)
class Check:
    """One implementation at one case."""

    subject: Subject
    implementation: str
    case: Any

    @property
    def label(self) -> str:
        """The start of the printed line."""
        return f"{self.subject.operation.__name__} {self.implementation}: {self.case.name}"

    def run(self, inputs: Any) -> tuple[bool, str]:
        """Run the case; return whether it passed, and the rest of the printed line."""
        operation = self.subject.operation
        call = partial(operation, implementation=self.implementation, **self.case.options)
        try:
            compiled = jax.jit(call).lower(*inputs.operands).compile()
        except NotImplementedError as refusal:
            return True, f"not run: {refusal}"
        # A fresh copy for each implementation, so that none sees what another did to the operands.
        operands = jax.tree.map(jax.numpy.asarray, inputs.operands)

        def run() -> Any:
            return jax.tree.map(np.asarray, compiled(*operands))

        out = run()
        same = all(same_bits(run(), out) for _ in range(_RUNS - 1))
        error = self.subject.error(inputs, out)
        limit = self.subject.limits[self.case.dtype]
        large = self.case in self.subject.cases.LARGE_CASES
        faults = [] if large or not same else self.faults(inputs, compiled, out)
        verdict = "ok" if error <= limit and same and not faults else "WRONG"
        line = (
            f"{verdict}  error {error:.1e} of {limit:.1e}, {'same bits' if same else 'BITS DIFFER'}"
        )
        line += "".join(f", {each}" for each in faults)
        if large:  # the times of small cases say nothing of speed
            seconds = seconds_per_call(self.subject, call, operands)
            amount, unit = self.case.work
            line += f", {seconds * 1e6:.0f} us, {amount / seconds / 1e9:.1f} G{unit}/s"
        return verdict == "ok", line

    def faults(
        self, inputs: Any, run: Callable[..., Any], out: Any, values: Mapping[str, float] = VALUES
    ) -> list[str]:
        """List the faults beside poisoned rows; `out` is what `run` makes of the clean inputs."""
        found = []
        for name, value in values.items():
            poisoned = self.subject.cases.poisoned(inputs, value)
            operands = jax.tree.map(jax.numpy.asarray, poisoned.operands)
            outputs = jax.tree.map(np.asarray, run(*operands))
            wrong = fault(value, out, poisoned, outputs, same_bits)
            found += [] if wrong is None else [f"{wrong} BESIDE {name}"]
        return found


def seconds_per_call(
    subject: Subject, call: Callable[..., Any], operands: tuple[Any, ...]
) -> float:
    """Time a call in a loop of calls in one program; each takes operands from the one before."""

    @partial(jax.jit, donate_argnums=1)
    def loop(count: int, fed: tuple[Any, ...], operands: tuple[Any, ...]) -> tuple[Any, ...]:
        def again(_: int, fed: tuple[Any, ...]) -> tuple[Any, ...]:
            given = dict(enumerate(operands)) | dict(zip(subject.fed, fed, strict=True))
            # The barrier keeps all outputs, even those that the next call does not take.
            return subject.feed(fed, lax.optimization_barrier(call(*given.values())))

        return lax.fori_loop(0, count, again, fed)

    fed = jax.tree.map(lambda x: x.copy(), tuple(operands[i] for i in subject.fed))

    def step(count: int) -> None:
        nonlocal fed
        fed = jax.block_until_ready(loop(count, fed, operands))

    def timed(count: int) -> float:
        return timeit.timeit(lambda: step(count), number=1)

    timed(1)
    count = int(min(max(_TIMED_SECONDS / timed(1), 1), 1000))
    return min(timed(count) for _ in range(_RUNS)) / count


def checks(platform: str, *, large: bool = True) -> Iterator[list[Check]]:
    """Yield the checks that the platform can run: for each case, its implementations together.

    Args:
      large: whether accelerators run the large cases, too.
    """
    large = large and platform != "cpu"
    for subject in SUBJECTS:
        names = [name for name, platforms in subject.platforms.items() if platform in platforms]
        for case in subject.cases.CASES + subject.cases.LARGE_CASES * large:
            yield [Check(subject, name, case) for name in names]


def outcomes(together: Sequence[Check], seed: int) -> Iterator[tuple[str, bool, str]]:
    """Run the implementations at one case; yield label, whether each passed, and the line's rest.

    The case's inputs and expected outputs are made once for all and dropped at the end."""
    inputs = None
    for check in together:
        try:
            if inputs is None:
                inputs = check.subject.cases.make_inputs(check.case, seed)
            passed, line = check.run(inputs)
        except Exception as error:  # one broken kernel must not hide the others
            traceback.print_exc()
            passed, line = False, f"WRONG  {type(error).__name__}"
        yield check.label, passed, line


def main(_: list[str]) -> int:
    """Run all checks and print their lines; return the exit code."""
    fresh = int(np.random.SeedSequence().generate_state(1)[0])
    seed = fresh if _SEED.value is None else _SEED.value
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, seed {seed}", flush=True)
    began = timeit.default_timer()
    failed = []
    for together in checks(jax.default_backend(), large=_LARGE.value):
        wanted = [check for check in together if _ONLY.value in check.label]
        for label, passed, line in outcomes(wanted, seed):
            print(f"{label:60} {line}", flush=True)
            failed += [] if passed else [label]
    print("".join(f"wrong: {label}\n" for label in failed), end="")
    print(f"{len(failed)} wrong in {timeit.default_timer() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(app.run(main))
