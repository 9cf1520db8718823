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
from pallas_kernels.kv_write import api as write_api
from pallas_kernels.kv_write import cases as write_cases
from pallas_kernels.page_copy import api as copy_api
from pallas_kernels.page_copy import cases as gather_cases
from pallas_kernels.page_copy import scatter_cases
from pallas_kernels.paged_attention import api as paged_api
from pallas_kernels.paged_attention import append_cases
from pallas_kernels.paged_attention import cases as paged_cases
from pallas_kernels.paged_attention.cases import Pool, decoded
from pallas_kernels.poison import VALUES, fault
from pallas_kernels.prefill_attention import api as prefill_api
from pallas_kernels.prefill_attention import cases as prefill_cases
from pallas_kernels.product import add_cases as add_product_cases
from pallas_kernels.product import api as product_api
from pallas_kernels.product import cases as product_cases
from pallas_kernels.quantised import LIMITS as LARGEST
from pallas_kernels.swiglu import api as swiglu_api
from pallas_kernels.swiglu import cases as swiglu_cases

_ONLY = flags.DEFINE_string("only", "", "Run the cases whose label contains this.")
_LARGE = flags.DEFINE_bool("large", True, "On accelerators, run and time the large cases, too.")
_SEED = flags.DEFINE_integer("seed", None, "Seed of the inputs; a fresh one if not given.")

LIMITS = {"float32": 2e-5, "bfloat16": 1e-2}
"""Largest error by the type of q, to which results, and in kernels the weights, are rounded."""

SWIGLU_LIMITS = LIMITS | {"bfloat16": 3.3 * 2**-8}
"""As `LIMITS`, where the reference rounds gate, up and the result, each by up to 2^-8 of itself in
bfloat16. The relative errors of up and of the result add up. silu multiplies that of a gate g > 0
by 1 + g / (1 + exp(g)), at most 1.28. Together, and to all orders, the error is 3.281 * 2^-8 of the
number, and at most that share of the token's largest; errors of float32 sums are far smaller. A
gate g < 0 contributes at most 0.27 of its up, which is less, unless g < -2.4 where up is 4.8 times
the token's largest number. No token of many random gates and ups is like that."""

_RUNS = 3
_TIMED_SECONDS = 0.05
_HUGE = 1e30  # larger than any input


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over largest expected number; infinite if any result is not finite."""
    if not np.isfinite(actual.astype(np.float32)).all():
        return float("inf")
    largest = max(float(np.abs(expected).max(initial=0)), 1e-30)
    return float(np.abs(actual.astype(np.float32) - expected).max(initial=0)) / largest


def attention_error(inputs: Any, out: np.ndarray) -> float:
    """Relative error of an attention over `Inputs` of its cases."""
    return relative_error(out, inputs.expected)


def write_error(
    inputs: write_cases.Inputs, outputs: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> float:
    """Largest error in q and in both pools; infinite if memory changed outside the writes."""
    real = inputs.real
    q, *pools = outputs
    before = inputs.k_pages, inputs.v_pages
    return max(relative_error(q[real], inputs.made[0][real]), *pool_errors(inputs, before, pools))


def pool_errors(
    inputs: write_cases.Inputs,
    before: Sequence[Pool],
    after: Sequence[Pool],
    error_of: Callable[..., float] = relative_error,
) -> list[float]:
    """Errors of K and of V where they were written; infinite if memory changed elsewhere."""
    errors = []
    for was, pool, new in zip(before, after, inputs.made[1:], strict=True):
        arrays = zip(jax.tree.leaves(was), jax.tree.leaves(pool), strict=True)
        lost = any((changed(*pair) & inputs.kept).any() for pair in arrays)
        error = error_of(decoded(pool, *inputs.written), new)
        errors.append(float("inf") if lost else error)
    return errors


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """bool[P, S]: where in [K, P, S, ...] a bit differs."""
    size = before.shape[:3]
    bits = (np.ascontiguousarray(x).view(np.uint8).reshape(*size, -1) for x in (before, after))
    return np.not_equal(*bits).any(axis=(0, 3))


def append_error(inputs: append_cases.Inputs, outputs: tuple[np.ndarray, Pool, Pool]) -> float:
    """Largest error in the attention and in both pools.

    In quantised pages it is the error of the attention over the written pages, and the part of the
    pools' error that rounding does not explain.
    """
    o, *pools = outputs
    dtype = inputs.paged.case.kv_dtype
    expected = inputs.expected if dtype is None else inputs.attention(*pools)
    error_of = relative_error if dtype is None else partial(rounding_error, dtype=dtype)
    errors = pool_errors(inputs.write, inputs.pools, pools, error_of)
    return max(relative_error(o, expected), *errors)


def rounding_error(actual: np.ndarray, exact: np.ndarray, *, dtype: str) -> float:
    """As `relative_error` of [..., H], beyond the error that `quantised.encode` to the type may
    make."""
    size = np.abs(exact)
    scale = size.max(axis=-1, keepdims=True, initial=0) / LARGEST[dtype]
    allowed = scale / 2 if dtype == "int8" else np.maximum(size / 16, scale / 1024)
    return relative_error(exact + np.maximum(np.abs(actual - exact) - allowed, 0), exact)


def add_error(inputs: add_cases.Inputs, outputs: tuple[np.ndarray, np.ndarray]) -> float:
    """Largest relative error of a token's scale; infinite if a sum differs in any bit."""
    (total, scale), (expected_total, expected_scale) = outputs, inputs.expected
    if not same_bits(total, expected_total):
        return float("inf")
    return float(np.abs(scale / expected_scale - 1).max())


def sum_error(inputs: add_product_cases.Inputs, outputs: tuple[np.ndarray, np.ndarray]) -> float:
    """Largest error of the sum and of a token's scale."""
    pairs = zip(outputs, inputs.expected, strict=True)
    return max(relative_error(*pair) for pair in pairs)


def swiglu_error(inputs: swiglu_cases.Inputs, out: np.ndarray) -> float:
    """Largest error of a token relative to its own largest number, since tokens differ in size."""
    return max(relative_error(*token) for token in zip(out, inputs.expected, strict=True))


def gather_error(inputs: gather_cases.Inputs, out: np.ndarray) -> float:
    """0, or infinite if any bit differs."""
    return 0.0 if same_bits(out, inputs.expected) else float("inf")


def scatter_error(inputs: scatter_cases.Inputs, pools: tuple[np.ndarray, ...]) -> float:
    """As `gather_error`, for all pages but the null page."""
    pairs = zip(pools, inputs.expected, strict=True)
    same = all(same_bits(pool[:, 1:], want[:, 1:]) for pool, want in pairs)
    return 0.0 if same else float("inf")


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees of arrays have the same types and bits; NaN equals itself."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(_bits(x), _bits(y)) for x, y in pairs)


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


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
GATHER = Subject(
    copy_api.gather,
    copy_api.PLATFORMS,
    gather_cases,
    error=gather_error,
    fed=(1,),  # page_ids
    feed=_feed_ids,
)
SCATTER = Subject(copy_api.scatter, copy_api.SCATTER_PLATFORMS, scatter_cases, error=scatter_error)
SUBJECTS = (ADD, WRITE, PRODUCT, ADD_PRODUCT, SWIGLU, PAGED, APPEND, PREFILL, GATHER, SCATTER)


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
