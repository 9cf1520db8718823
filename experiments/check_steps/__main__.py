"""Do the whole steps on this accelerator (bfloat16, its kernels) compute what float32 computes with
the reference implementations, in every bucket?

The same weights and tokens run three times, each time in other programs:

  kernels    bfloat16, each operation by the implementation proven on the platform, or by --kernels
  reference  bfloat16, every operation by its reference: shows the effect of rounding alone
  float32    the same weights in float32, every operation by its reference: the exact result

The logits of many tokens, and all K and V that the steps left in the pool, are compared. A bucket
is WRONG if

  * in kernels or reference, the logits of a row, or K or V of a token in a layer, are off by more
    than --bound, in relative L2 norm. A rounding to bfloat16 is off by up to 2^-9. Over the 2 L
    sums of the residual stream errors add up like steps in random directions: 2^-9 sqrt(2 L) =
    0.011 for 16 layers; attention multiplies them. The worst rows measured have 3 to 11 times that
    on a CPU; the default is 16. A wrong page or rotation gives 0.5 to 1.8.
  * the kernels' error, in the mean of squares over rows, is above --ratio times the reference's.
  * kernels choose a token with a float32 logit below the best one by more than twice the largest
    error of a logit of reference, times --ratio. (Errors alone allow any choice within twice their
    size.)

Buckets: --prefill=64x8 is tokens x pages of a step with ragged prompts and a chunk over earlier
tokens; --decode=8x16 is rows x pages of a table, for several ticks.

  python -m experiments.check_steps --model=llama_1b
  python -m experiments.check_steps --model=llama_1b --kernels=mosaic_gpu
  python -m experiments.check_steps --model=tiny --page_size=16

Prints a table, writes JSON; ends with 1 if anything is WRONG.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from absl import flags

from experiments.check_steps.batches import (
    Batches,
    decode_batches,
    mixed_batches,
    parse,
    parse_mixed,
    prefill_batches,
)
from experiments.check_steps.steps import (
    KERNELS,
    REFERENCE,
    Outcome,
    Steps,
    kv_error,
    proven,
    upcast,
    weights,
)
from experiments.common.origin import origin, save
from experiments.common.shapes import MODELS
from experiments.common.tables import table
from pdjax.core.model_spec import ModelSpec
from pdjax.device.models.decoder import Params
from pdjax.flags import new_flags, run

FLAGS = new_flags()
_MODEL = flags.DEFINE_enum("model", "llama_1b", list(MODELS), "shapes", flag_values=FLAGS)
_LAYERS = flags.DEFINE_integer("layers", None, "layers instead of the model's", flag_values=FLAGS)
_PREFILL = flags.DEFINE_list(
    "prefill", ["64x8", "256x32", "1024x64"], "steps, tokens x pages", flag_values=FLAGS
)
_DECODE = flags.DEFINE_list(
    "decode", ["1x32", "8x16", "64x8"], "ticks, rows x pages of a table", flag_values=FLAGS
)
_MIXED = flags.DEFINE_list(
    "mixed",
    ["8x16/64x8", "64x8/512x32"],
    "mixed steps, rows x pages of a table / tokens x pages",
    flag_values=FLAGS,
)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 64, "tokens a page", flag_values=FLAGS)
_KERNELS = flags.DEFINE_enum(
    "kernels",
    None,
    list(KERNELS),
    "run these wherever an operation has them, proven or not; else the proven ones",
    flag_values=FLAGS,
)
_BOUND = flags.DEFINE_float(
    "bound", None, "largest relative L2 error; else 16 x 2^-9 sqrt(2 L)", flag_values=FLAGS
)
_RATIO = flags.DEFINE_float(
    "ratio", 2.0, "largest error of kernels over that of references", flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", "results/check_steps.json", "file to write", flag_values=FLAGS)


@dataclass(frozen=True)
class Errors:
    """Errors of rows' logits, and of the pages, against float32.

    Attributes:
      relative: f64[rows], relative errors in L2 norm.
      largest: f64[rows], largest error of a logit, in standard deviations of the row's float32
        logits.
      behind: f64[rows], best float32 logit minus that of the chosen token, in the same unit; 0
        where the choice is the same.
      kv: see `kv_error`.
    """

    relative: np.ndarray
    largest: np.ndarray
    behind: np.ndarray
    kv: float

    @classmethod
    def of(cls, found: Outcome, exact: Outcome) -> "Errors":
        """Compute the errors over all steps of a bucket."""
        rows = [_row_errors(*pair) for pair in zip(found.logits, exact.logits, strict=True)]
        relative, largest, behind = np.concatenate(rows, axis=1)
        return cls(relative, largest, behind, kv_error(found.pool, exact.pool))

    @property
    def rms(self) -> float:
        """Root mean square of the relative errors."""
        return float(np.sqrt(np.square(self.relative).mean()))

    def numbers(self) -> dict[str, Any]:
        """The numbers for the JSON file."""
        return {
            "relative": float(self.relative.max()),
            "relative_rms": self.rms,
            "largest_in_deviations": float(self.largest.max()),
            "kv": self.kv,
            "same_token": int((self.behind == 0).sum()),
            "rows": self.behind.size,
        }


def _row_errors(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Compute the three errors of rows, f64[3, rows], from logits f32[rows, V]."""
    found, exact = found.astype(np.float64), exact.astype(np.float64)
    wrong, unit = found - exact, exact.std(axis=1)
    relative = np.linalg.norm(wrong, axis=1) / np.linalg.norm(exact, axis=1)
    chosen = np.take_along_axis(exact, found.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.stack(
        [relative, np.abs(wrong).max(axis=1) / unit, (exact.max(axis=1) - chosen) / unit]
    )


@dataclass(frozen=True)
class Limits:
    """The allowed errors of a bucket; see the module."""

    bound: float
    ratio: float

    def tolerance(self, plain: Errors) -> float:
        """Return how far behind a chosen token may be, given the errors of `reference`."""
        return 2 * self.ratio * float(plain.largest.max())

    def broken(self, kernels: Errors, plain: Errors) -> list[str]:
        """List the limits that a bucket breaks. The comparisons make NaN break them."""
        found = []
        for name, errors in (("kernels", kernels), ("reference", plain)):
            for what, error in (("logits", errors.relative.max()), ("KV", errors.kv)):
                if not error <= self.bound:
                    found.append(f"{name}: error of {what} {error:.2g}, above {self.bound:.2g}")
        if not kernels.rms <= self.ratio * plain.rms:
            found.append(
                f"kernels: RMS of errors {kernels.rms:.2g}, above {self.ratio:g} times the "
                f"reference's {plain.rms:.2g}"
            )
        if outside := int((~(kernels.behind <= self.tolerance(plain))).sum()):
            found.append(f"kernels: {outside} tokens chosen that rounding does not explain")
        return found


def check(
    spec: ModelSpec,
    half: Params,
    buckets: list[Batches],
    page_size: int,
    kernels: str | None,
    limits: Limits,
) -> list[dict[str, Any]]:
    """Return a row of results for each bucket, for a model with bfloat16 weights `half`."""
    whole = upcast(half)
    kinds = ((half, kernels), (half, REFERENCE), (whole, REFERENCE))
    programs = [
        [Steps(spec, params, page_size, name, bucket) for params, name in kinds]
        for bucket in buckets
    ]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # compilation takes most of the time
        list(threads.map(Steps.compile, chain.from_iterable(programs)))
    results = []
    for bucket, steps in zip(buckets, programs, strict=True):
        *found, exact = (each.run(bucket) for each in steps)
        ours, plain = (Errors.of(each, exact) for each in found)
        results.append(
            {
                "bucket": bucket.name,
                "steps": len(bucket.steps),
                "kernels_in_program": steps[0].kernels,
                "kernels": ours.numbers(),
                "reference": plain.numbers(),
                "tolerance_in_deviations": limits.tolerance(plain),
                "furthest_behind_in_deviations": float(ours.behind.max()),
                "outside_tolerance": int((~(ours.behind <= limits.tolerance(plain))).sum()),
                "wrong": limits.broken(ours, plain),
            }
        )
    return results


def show(results: list[dict[str, Any]]) -> str:
    """Make the table: errors as kernels / reference, and broken limits."""
    head = ["bucket", "with kernels", "rows", "relative L2", "its RMS", "largest / std", "K and V"]
    head += ["same token", "other, within", "outside", ""]
    rows = []
    for row in results:
        ours, plain = row["kernels"], row["reference"]
        errors = ("relative", "relative_rms", "largest_in_deviations", "kv")
        other = ours["rows"] - ours["same_token"] - row["outside_tolerance"]
        rows.append(
            [
                row["bucket"],
                ", ".join(row["kernels_in_program"]) or "none",
                str(ours["rows"]),
                *(f"{ours[name]:.4f} / {plain[name]:.4f}" for name in errors),
                f"{ours['same_token']} / {plain['same_token']}",
                str(other),
                str(row["outside_tolerance"]),
                "WRONG" if row["wrong"] else "ok",
            ]
        )
    wrong = [f"WRONG {row['bucket']}: {what}" for row in results for what in row["wrong"]]
    return "\n".join([table(head, rows), *wrong])


def main() -> int:
    """Check, print, save; see the module."""
    began = time.perf_counter()
    spec, page_size = MODELS[_MODEL.value or ""], _PAGE_SIZE.value or 0
    spec = replace(spec, num_layers=spec.num_layers if _LAYERS.value is None else _LAYERS.value)
    if page_size < 1:
        raise ValueError(f"page_size={page_size}: must be at least 1 token")
    makers: tuple[tuple[Any, Any, Any], ...] = (
        (prefill_batches, parse, _PREFILL.value),
        (decode_batches, parse, _DECODE.value),
        (mixed_batches, parse_mixed, _MIXED.value),
    )
    buckets = [
        make(*parsed(text), page_size, spec.vocab_size)
        for make, parsed, texts in makers
        for text in texts or ()
    ]
    usual = 16 * 2**-9 * (2 * spec.num_layers) ** 0.5
    limits = Limits(usual if _BOUND.value is None else _BOUND.value, _RATIO.value or 0.0)
    whole: dict[str, Any] = {
        "model": _MODEL.value,
        "layers": spec.num_layers,
        "page_size": page_size,
        "kernels": proven(_KERNELS.value),
        "bound": limits.bound,
        "ratio": limits.ratio,
        **origin(),
    }
    for name in ("model", "layers", "page_size", "kernels", "devices", "commit"):
        print(f"{name}: {whole[name]}", flush=True)
    whole["buckets"] = check(spec, weights(spec), buckets, page_size, _KERNELS.value, limits)
    whole["seconds"] = time.perf_counter() - began
    print(f"\nErrors: kernels / reference, in bfloat16, of float32; bound {limits.bound:.3f}")
    print(show(whole["buckets"]))
    save(whole, _OUT.value)
    return 1 if any(row["wrong"] for row in whole["buckets"]) else 0


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
