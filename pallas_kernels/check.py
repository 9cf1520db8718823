"""Runs every implementation over every case on the hardware at hand; exits with 1 if one is wrong.

    python -m pallas_kernels.check [--only=SUBSTRING] [--seed=N]

One line a case: the largest error in units of the largest expected number, the time of one call
inside a compiled loop, and the rate at which that read KV or computed. Inputs are fresh random
numbers in scattered pages, memory that must not matter is NaN, and every run is repeated to see the
same bits again. Accelerators also run the large cases.
"""

import sys
import timeit
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import app, flags
from jax import lax

from pallas_kernels.paged_attention import api as paged_api
from pallas_kernels.paged_attention import cases as paged_cases
from pallas_kernels.prefill_attention import api as prefill_api
from pallas_kernels.prefill_attention import cases as prefill_cases

_ONLY = flags.DEFINE_string("only", "", "Run the cases whose label contains this.")
_SEED = flags.DEFINE_integer("seed", None, "Seed of the inputs; a fresh one if not given.")

LIMITS = {"float32": 2e-5, "bfloat16": 1e-2}
"""Largest error, by the type of q: results, and in kernels the weights, are rounded to it."""

_KERNELS = {"gpu": ("mosaic_gpu",), "tpu": ("mosaic_tpu",)}
_RUNS = 3
_TIMED_SECONDS = 0.05


@dataclass(frozen=True)
class Check:
    """One implementation at one case."""

    operation: Callable[..., jax.Array]
    implementation: str
    case: Any
    make_inputs: Callable[[Any, int], Any]

    @property
    def label(self) -> str:
        """What the line begins with."""
        return f"{self.operation.__name__} {self.implementation}: {self.case.name}"

    def run(self, seed: int) -> tuple[bool, str]:
        """Whether all is well, and the rest of the line."""
        call = partial(self.operation, implementation=self.implementation, **self.case.options)
        inputs = self.make_inputs(self.case, seed)
        operands = jax.tree.map(jax.numpy.asarray, inputs.operands)
        try:
            compiled = jax.jit(call).lower(*operands).compile()
        except NotImplementedError as refusal:
            return True, f"not run: {refusal}"
        outputs = [np.asarray(compiled(*operands)) for _ in range(_RUNS)]
        same_bits = len({output.tobytes() for output in outputs}) == 1
        error = relative_error(outputs[0], inputs.expected)
        limit = LIMITS[self.case.dtype]
        seconds = seconds_per_call(call, operands)
        amount, unit = self.case.work
        verdict = "ok" if error <= limit and same_bits else "WRONG"
        return verdict == "ok", (
            f"{verdict}  error {error:.1e} of {limit:.0e}, "
            f"{'same bits' if same_bits else 'BITS DIFFER'}, "
            f"{seconds * 1e6:.0f} us, {amount / seconds / 1e9:.1f} G{unit}/s"
        )


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected number; infinite if any result is not finite."""
    if not np.isfinite(actual.astype(np.float32)).all():
        return float("inf")
    largest = max(float(np.abs(expected).max()), 1e-30)
    return float(np.abs(actual.astype(np.float32) - expected).max()) / largest


def seconds_per_call(call: Callable[..., jax.Array], operands: tuple[jax.Array, ...]) -> float:
    """Time of a call among many in one program, each of which takes the result before it as q."""

    @jax.jit
    def loop(count: int, q: jax.Array, *rest: jax.Array) -> jax.Array:
        return lax.fori_loop(0, count, lambda _, q: call(q, *rest), q)

    def timed(count: int) -> float:
        return timeit.timeit(lambda: loop(count, *operands).block_until_ready(), number=1)

    timed(1)
    count = int(min(max(_TIMED_SECONDS / timed(1), 1), 1000))
    return min(timed(count) for _ in range(_RUNS)) / count


def checks(platform: str) -> Iterator[Check]:
    """All that the platform can run."""
    large = platform != "cpu"
    for name in ("reference", *_KERNELS.get(platform, ())):
        for paged in paged_cases.CASES + paged_cases.LARGE_CASES * large:
            yield Check(paged_api.paged_attention, name, paged, paged_cases.make_inputs)
    for prefill in prefill_cases.CASES + prefill_cases.LARGE_CASES * large:
        operation = prefill_api.prefill_attention
        yield Check(operation, "reference", prefill, prefill_cases.make_inputs)


def main(_: list[str]) -> int:
    """Returns the exit code."""
    fresh = int(np.random.SeedSequence().generate_state(1)[0])
    seed = fresh if _SEED.value is None else _SEED.value
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, seed {seed}", flush=True)
    failed = []
    for check in checks(jax.default_backend()):
        if _ONLY.value in check.label:
            try:
                passed, line = check.run(seed)
            except Exception as error:  # one broken kernel must not hide the others
                traceback.print_exc()
                passed, line = False, f"WRONG  {type(error).__name__}"
            print(f"{check.label:60} {line}", flush=True)
            failed += [] if passed else [check.label]
    print(f"{len(failed)} wrong" + "".join(f"\n  {label}" for label in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(app.run(main))
