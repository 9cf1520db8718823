"""How close do the steps, and the kernels in them, come to the limits of the device?

In one run, on one device, with random weights and greedy tokens:

  ceilings  copy and read bandwidth, bfloat16 products (a burst, and for a second: prefill is
            compared with the latter, since a power-limited card clocks down), host dispatch
  kernels   attention alone, within one program, beside cuDNN where that computes the same
  decode    whole ticks back to back, the last one's tokens read; the floor is the bytes of weights
            and KV that a tick must read at the copy bandwidth of this run
  prefill   whole steps back to back; the floor is the model's arithmetic (layers and causal
            attention for every token, the vocabulary for one a prompt) at the sustained rate
  mixed     whole mixed steps back to back, and the same chunks and rows in two steps; the floor is
            the model's arithmetic, and then the rows' KV at the read bandwidth; its parts are its
            products alone, of as many tokens, and that KV

  python -m experiments.bench_steps --model=llama3_8b
  python -m experiments.bench_steps --sections=ceilings,decode --decode=64x1060 --layers=4 --profile
  python -m experiments.bench_steps --sections=ceilings,kernels,decode --kv_dtype=int8
  python -m experiments.bench_steps --sections=decode --decode=8x1060 --decode=8of64x1060
  python -m experiments.bench_steps --model=tiny

Shapes: 64x1060 is rows x context to --decode, and 8of64x1060 the same with 8 of an engine's 64 rows
active. 8x1024 is prompts x length to --prefill, which also takes 300+700 (prompts of several
lengths) and 2048@6144 (a chunk over earlier tokens); 64x1060/1x512 is one of each to --mixed.
Prints each number, and writes all numbers so far as JSON after it. Ends with 1 if a case failed.
"""

import gc
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.baselines import vllm
from experiments.bench_steps import ceilings
from experiments.bench_steps import tables as step_tables
from experiments.bench_steps.batches import decode_batches, mixed_batches, prefill_batches
from experiments.bench_steps.cases import LARGE, TINY, DecodeCase, MixedCase, PrefillCase
from experiments.bench_steps.engines import StepEngines, StepTime
from experiments.bench_steps.floors import (
    decode_bytes,
    mixed_floor_s,
    prefill_flops,
    rows_kv_bytes,
)
from experiments.bench_steps.kernel_times import Kernel, Setting, kernels
from experiments.common import kernel_profile
from experiments.common.origin import origin, write_json
from experiments.common.shapes import MODELS, SHAPES, chosen_model
from pallas_kernels.paged_attention.api import IMPLEMENTATIONS
from pdjax.core.kv_layout import QUANTISED_DTYPES
from pdjax.device.compat import keep_compilations
from pdjax.flags import new_flags, run

SECTIONS = ("ceilings", "kernels", "decode", "prefill", "mixed")
PREFILL_TOKENS = 32768
"""About how many tokens a round computes, in at least three steps."""

FLAGS = new_flags()
_MODEL = flags.DEFINE_enum("model", None, list(MODELS), SHAPES, flag_values=FLAGS)
_LAYERS = flags.DEFINE_integer(
    "layers", None, "layers instead of the model's: compiles sooner", flag_values=FLAGS
)
_SECTIONS = flags.DEFINE_list(
    "sections", list(SECTIONS), "what to measure, comma-separated", flag_values=FLAGS
)
_DECODE = flags.DEFINE_multi_string("decode", [], "a tick's shape", flag_values=FLAGS)
_PREFILL = flags.DEFINE_multi_string("prefill", [], "a step's shape", flag_values=FLAGS)
_MIXED = flags.DEFINE_multi_string("mixed", [], "a mixed step's shape", flag_values=FLAGS)
_ONLY = flags.DEFINE_string(
    "only", "", "only cases with this in their label, as in paged_attention", flag_values=FLAGS
)
_ATTENTION = flags.DEFINE_enum(
    "attention",
    None,
    list(IMPLEMENTATIONS),
    "attention of ticks, and of kernels timed alone, by name; else the platform's",
    flag_values=FLAGS,
)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 64, "tokens a page", flag_values=FLAGS)
_KV_DTYPE = flags.DEFINE_enum(
    "kv_dtype",
    None,
    ["float32", "bfloat16", *QUANTISED_DTYPES],
    "type of the pools of decode attention and of ticks; else the model's",
    flag_values=FLAGS,
)
_STEPS = flags.DEFINE_integer("steps", 32, "ticks of a round", flag_values=FLAGS)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "rounds; the median counts", flag_values=FLAGS)
_PROFILE = flags.DEFINE_bool(
    "profile", False, "also list the kernels of each step", flag_values=FLAGS
)
_CACHE = flags.DEFINE_string("cache", "", "compilation cache to use", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "results/bench_steps.json", "file to write", flag_values=FLAGS)


class Bench:
    """One run: its settings, and its numbers so far.

    Args:
      model: name of the shapes.
      layers: number of layers instead of the model's, or None.
      attention: name of an implementation, or None.
      page_size: tokens a page.
      kv_dtype: type of decode's pools; None takes that of the weights.
      out: file that is written after each number.
    """

    def __init__(
        self,
        model: str,
        layers: int | None,
        attention: str | None,
        page_size: int,
        kv_dtype: str | None,
        out: Path,
    ) -> None:
        spec = MODELS[model]
        self.spec = replace(spec, num_layers=layers or spec.num_layers)
        self.dtype = "float32" if model == "tiny" else "bfloat16"
        self.usual = TINY if model == "tiny" else LARGE
        self.attention, self.page_size = attention, page_size
        self.kv_dtype = kv_dtype or self.dtype
        self.itemsize = jnp.dtype(self.dtype).itemsize
        # vLLM's numbers are of exactly this model, on this kind of card.
        self.beside_vllm = model == vllm.MODEL and self.spec == spec
        self.beside_vllm &= self.kv_dtype == self.dtype
        self.beside_vllm &= vllm.DEVICE in jax.devices()[0].device_kind
        self.ceilings: ceilings.Ceilings | None = None
        self.failed: list[str] = []
        self._out = out
        self.whole: dict[str, Any] = {
            "model": model,
            "spec": asdict(self.spec),
            "layers": f"{self.spec.num_layers} of {spec.num_layers}",
            "dtype": self.dtype,
            "page_size": page_size,
            "kv_dtype": self.kv_dtype,
            "attention": attention,
            **origin(),
            "failed": self.failed,
            **{name: [] for name in SECTIONS[1:]},
            "profiles": {},
        }

    def attempt(self, label: str, measure: Callable[[], None]) -> None:
        """Run one case; if it fails, the other cases still run."""
        try:
            measure()
        except Exception:
            traceback.print_exc()
            print(f"{label}: FAILED", flush=True)
            self.failed.append(label)
        write_json(self.whole, self._out)
        gc.collect()  # the next case needs the pool's memory

    def note(self, section: str, row: dict[str, Any]) -> None:
        """Store a row of a section, and show it at once."""
        self.whole[section].append(row)
        print(step_tables.line(section, row), flush=True)

    def measure_ceilings(self) -> None:
        self.ceilings = ceilings.measure()
        self.whole["ceilings"] = asdict(self.ceilings)
        print(step_tables.show_ceilings(self.ceilings), flush=True)

    def measure_kernel(self, kernel: Kernel) -> None:
        seconds = kernel.time()
        ceiling = self._ceiling("copy" if kernel.unit == "B" else "matmul_sustained")
        row = {"kernel": kernel.name, "case": kernel.case, "us": seconds * 1e6}
        rate = {"rate": kernel.work / seconds, "unit": kernel.unit}
        self.note("kernels", row | rate | _beside(seconds, kernel.work, ceiling))

    def measure_decode(self, case: DecodeCase, engines: StepEngines) -> None:
        steps, rounds = _STEPS.value or 1, _ROUNDS.value or 1
        batches, pages = decode_batches(case, steps, self.page_size, self.spec.vocab_size)
        took, again = engines.time_decode(batches, pages, self.attention, rounds)
        work = decode_bytes(self.spec, case, self.itemsize, self.kv_dtype)
        row = {"case": case.name, **_step_row(took), "bytes": work}
        row |= _beside(took.seconds, work, self._ceiling("copy"))
        if self.beside_vllm:
            row["vllm_ms"] = vllm.DECODE_MS.get(case.name)
        self.note("decode", row)
        self._profile(f"decode {case.name}", again)

    def measure_prefill(self, case: PrefillCase, engines: StepEngines) -> None:
        batches, pages = prefill_batches(case, self.page_size, self.spec.vocab_size)
        many = PREFILL_TOKENS if self.usual is LARGE else 1
        steps, rounds = max(3, many // case.tokens), _ROUNDS.value or 1
        took, again = engines.time_prefill(batches, pages, steps, rounds)
        work = prefill_flops(self.spec, case)
        row = {"case": case.name, **_step_row(took), "flops": work}
        row |= _beside(took.seconds, work, self._ceiling("matmul_sustained"))
        row |= {"tokens_per_s": case.tokens / took.seconds, "flops_per_s": work / took.seconds}
        if self.beside_vllm:
            row["vllm_tokens_per_s"] = vllm.PREFILL_TOKENS_PER_S.get(case.name)
        self.note("prefill", row)
        self._profile(f"prefill {case.name}", again)

    def measure_mixed(self, case: MixedCase, engines: StepEngines) -> None:
        steps, rounds = _STEPS.value or 1, _ROUNDS.value or 1
        made = mixed_batches(case, steps, self.page_size, self.spec.vocab_size)
        took, two, again = engines.time_mixed(*made, self.attention, rounds)
        row = {"case": case.name, **_step_row(took)}
        row |= dict.fromkeys(("floor_ms", "ratio", "products_ms", "kv_ms", "of_parts"))
        if self.ceilings is not None:
            rates = self.ceilings.matmul_sustained, self.ceilings.read
            floor_ms = mixed_floor_s(self.spec, case, self.dtype, *rates) * 1e3
            row |= {"floor_ms": floor_ms, "ratio": took.seconds * 1e3 / floor_ms}
            sizes = case.rows.rows + case.chunks.tokens, case.rows.rows + len(case.chunks.chunks)
            products = engines.time_products(*sizes, steps, rounds)
            kv = rows_kv_bytes(self.spec, case.rows, self.dtype) / self.ceilings.read
            row |= {"products_ms": products * 1e3, "kv_ms": kv * 1e3}
            row |= {"of_parts": took.seconds / (products + kv)}
        row |= {"two_ms": two.seconds * 1e3, "of_two": took.seconds / two.seconds}
        self.note("mixed", row)
        self._profile(f"mixed {case.name}", again)

    def _ceiling(self, name: str) -> float | None:
        return None if self.ceilings is None else getattr(self.ceilings, name)

    def _profile(self, label: str, step: Callable[[], object]) -> None:
        if _PROFILE.value:
            found = kernel_profile.profile(step)
            self.whole["profiles"][label] = [asdict(row) for row in found]
            print(kernel_profile.show(found), flush=True)


def _step_row(took: StepTime) -> dict[str, Any]:
    """Return the columns that rows of decode and of prefill share."""
    return {
        "ms": took.seconds * 1e3,
        "rounds_ms": [seconds * 1e3 for seconds in took.rounds],
        "dispatch_ms": took.dispatch_s * 1e3,
        "compile_s": took.compile_s,
        "temporary_bytes": took.temporary_bytes,
    }


def _beside(seconds: float, work: float, ceiling: float | None) -> dict[str, float | None]:
    """Return the floor, in milliseconds for `work` at `ceiling` a second, and the ratio of the
    measured time to it; None where the ceiling was not measured."""
    if ceiling is None:
        return {"floor_ms": None, "ratio": None}
    return {"floor_ms": work / ceiling * 1e3, "ratio": seconds * ceiling / work}


def bench(sections: list[str], one: Bench) -> None:
    """Run the given sections in the order of SECTIONS: ceilings come first."""
    if "ceilings" in sections:
        one.attempt("ceilings", one.measure_ceilings)
    if "kernels" in sections:
        setting = Setting(one.spec, one.dtype, one.page_size, one.kv_dtype, one.attention)
        for kernel in kernels(setting, one.usual):
            if _asked(kernel.label):
                one.attempt(kernel.label, partial(one.measure_kernel, kernel))
    ticks = map(DecodeCase.parse, (_DECODE.value or one.usual.decode) * ("decode" in sections))
    steps = map(PrefillCase.parse, (_PREFILL.value or one.usual.prefill) * ("prefill" in sections))
    both = map(MixedCase.parse, (_MIXED.value or one.usual.mixed) * ("mixed" in sections))
    whole: list[tuple[str, Callable[[StepEngines], None]]] = [
        *((f"decode {case.name}", partial(one.measure_decode, case)) for case in ticks),
        *((f"prefill {case.name}", partial(one.measure_prefill, case)) for case in steps),
        *((f"mixed {case.name}", partial(one.measure_mixed, case)) for case in both),
    ]
    if whole := [each for each in whole if _asked(each[0])]:
        engines = StepEngines(one.spec, one.dtype, one.page_size, one.kv_dtype)
        one.whole["weights_s"] = engines.weights_s
        print(f"weights made in {engines.weights_s:.1f} s", flush=True)
        for label, measure in whole:
            one.attempt(label, partial(measure, engines))


def _asked(label: str) -> bool:
    return (_ONLY.value or "") in label


def main() -> int:
    """Measure, print, save; see the module."""
    sections = list(_SECTIONS.value or ())
    for name in sections:
        if name not in SECTIONS:
            raise ValueError(f"sections={name!r}: allowed are {', '.join(SECTIONS)}")
    for name in ("steps", "rounds", "page_size", "layers"):
        value = FLAGS[name].value
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if _CACHE.value:
        keep_compilations(_CACHE.value)
    out = Path(_OUT.value or "")
    one = Bench(
        chosen_model(_MODEL.value),
        _LAYERS.value,
        _ATTENTION.value,
        _PAGE_SIZE.value or 64,
        _KV_DTYPE.value,
        out,
    )
    said = (
        "model",
        "layers",
        "dtype",
        "kv_dtype",
        "page_size",
        "attention",
        "devices",
        "versions",
        "commit",
    )
    print("\n".join(f"{name}: {one.whole[name]}" for name in said), flush=True)
    bench(sections, one)
    print("\n" + step_tables.show(one.whole))
    print(f"saved {out}" + "".join(f"\nFAILED {label}" for label in one.failed))
    return 1 if one.failed else 0


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
