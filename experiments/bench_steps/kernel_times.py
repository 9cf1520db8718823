"""Times attention kernels alone: random numbers in scattered pages, many calls in one program.

Calls alternate between sets of pages, together more than the cache of any GPU holds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench_steps.cases import DecodeCase, PrefillCase, Usual
from experiments.bench_steps.floors import attention_flops, token_kv_bytes
from experiments.common.loops import noise, noisy_pages, seconds_a_call
from pallas_kernels.paged_attention.api import append_attention, paged_attention
from pallas_kernels.prefill_attention.api import prefill_attention
from pallas_kernels.quantised import Pages
from pdjax.core.model_spec import ModelSpec

_COLD_BYTES = 100e6
_MOST_TURNS = 16
_PROGRAM_SECONDS = 1e-3  # outlasts a dispatch
_FAST = {"B": 3e12, "FLOP": 6e14}  # rates a second of an H100, to estimate a program's length


@dataclass(frozen=True)
class Kernel:
    """One kernel at one shape, not yet run.

    Attributes:
      name, case: its operation, and its shape as the command line names it.
      work, unit: work of a call: bytes of KV to read ("B"), or operations ("FLOP").
      time: runs the kernel; returns seconds a call.
    """

    name: str
    case: str
    work: int
    unit: str
    time: Callable[[], float]

    @property
    def label(self) -> str:
        return f"{self.name} {self.case}"


@dataclass(frozen=True)
class Setting:
    """The settings that all kernels of a run share.

    Attributes:
      spec: heads and their dim.
      dtype, page_size: type of q and of the pools, and tokens a page.
      kv_dtype: type of the pools of decode attention.
      implementation: name of an implementation, or None for the platform's.
    """

    spec: ModelSpec
    dtype: str
    page_size: int
    kv_dtype: str
    implementation: str | None

    def kv_bytes(self, tokens: int) -> int:
        """Return the bytes of K and V of `tokens` tokens, in one layer of decode pools."""
        return tokens * token_kv_bytes(self.spec, self.kv_dtype)

    def pools(self, pages: int, dtype: str) -> tuple[Pages, Pages]:
        """Make K and V of one layer, [K, P, S, H], full of noise."""
        shape = (self.spec.kv_heads, pages, self.page_size, self.spec.head_dim)
        return noisy_pages(shape, dtype, 1), noisy_pages(shape, dtype, 2)

    def seconds(
        self, operation: Callable[..., Any], carry: Any, operands: Any, work: float, unit: str
    ) -> float:
        """Time a call that does `work`."""
        fast = jax.default_backend() != "cpu"
        calls = min(64, int(_PROGRAM_SECONDS * _FAST[unit] / work)) if fast else 1
        return seconds_a_call(
            operation, carry, operands, calls=calls, seconds=0.05 if fast else 0.005
        )


def kernels(setting: Setting, usual: Usual) -> Iterator[Kernel]:
    """Yield every kernel that the platform can run, at the shapes that `usual` names."""
    for decode, operation, cases in (
        (_paged, "paged_attention", usual.paged),
        (_append, "append_attention", usual.append),
    ):
        for case in map(DecodeCase.parse, cases):
            work = setting.kv_bytes(case.tokens)
            yield Kernel(operation, case.name, work, "B", partial(decode, setting, case))
    for prompts in map(PrefillCase.parse, usual.attention):
        work = attention_flops(setting.spec, prompts)
        run = partial(_prefill, setting, prompts)
        yield Kernel("prefill_attention", prompts.name, work, "FLOP", run)
        if jax.default_backend() == "gpu" and prompts.equal_prompts:
            yield Kernel("cudnn", prompts.name, work, "FLOP", partial(_cudnn, setting, prompts))


def _turns(kv_bytes: int) -> int:
    """Return the number of sets of pages that calls read in turn."""
    if jax.default_backend() == "cpu":
        return 2
    return min(_MOST_TURNS, 1 + int(_COLD_BYTES / kv_bytes))


def _scattered(turns: int, pages: int) -> np.ndarray:
    """Return i32[turns, pages]: different pages in random order, without the null page."""
    order = 1 + np.random.default_rng(0).permutation(turns * pages)
    return order.astype(np.int32).reshape(turns, pages)


def _tables(setting: Setting, case: DecodeCase, turns: int) -> list[jax.Array]:
    """Make a page table i32[B, W] for each turn."""
    width = -(-case.context // setting.page_size)
    tables = _scattered(turns, case.rows * width).reshape(turns, case.rows, width)
    return [jnp.asarray(table) for table in tables]


def _paged(setting: Setting, case: DecodeCase) -> float:
    spec, work = setting.spec, setting.kv_bytes(case.tokens)
    tables = _tables(setting, case, _turns(work))
    pages = 1 + sum(table.size for table in tables)
    k_pages, v_pages = setting.pools(pages, setting.kv_dtype)
    kv_lens = jnp.full(case.rows, case.context, jnp.int32)
    attend = partial(
        paged_attention, scale=spec.head_dim**-0.5, implementation=setting.implementation
    )
    return setting.seconds(
        lambda q, operands: attend(q, *operands),
        noise((case.rows, spec.query_heads, spec.head_dim), setting.dtype),
        [(k_pages, v_pages, table, kv_lens) for table in tables],
        work,
        "B",
    )


def _append(setting: Setting, case: DecodeCase) -> float:
    """Time calls that pass on the pools, so that each waits for the writes of the one before."""
    spec, work = setting.spec, setting.kv_bytes(case.tokens)
    tables = _tables(setting, case, _turns(work))
    pages = 1 + sum(table.size for table in tables)
    pools = setting.pools(pages, setting.kv_dtype)
    qkv = noise((case.rows, spec.kv_heads, spec.group + 2, spec.head_dim), setting.dtype)
    angles = noise((case.rows, spec.head_dim // 2), jnp.float32)
    token = (qkv, jnp.ones(case.rows, jnp.float32), None, jnp.cos(angles), jnp.sin(angles))
    kv_lens = jnp.full(case.rows, case.context, jnp.int32)
    attend = partial(
        append_attention, scale=spec.head_dim**-0.5, implementation=setting.implementation
    )

    def operation(carry: Any, operands: Any) -> Any:
        _, k_pages, v_pages = carry
        (qkv, scale, bias, cos, sin), table, kv_lens = operands
        return attend(qkv, scale, bias, cos, sin, k_pages, v_pages, table, kv_lens)

    out = jnp.zeros((case.rows, spec.query_heads, spec.head_dim), setting.dtype)
    operands = [(token, table, kv_lens) for table in tables]
    return setting.seconds(operation, (out, *pools), operands, work, "B")


def _prefill(setting: Setting, case: PrefillCase) -> float:
    spec = setting.spec
    kv_lens = [length + earlier for length, earlier in case.chunks]
    turns = _turns(setting.kv_bytes(sum(kv_lens)))
    pages = _scattered(turns, case.pages(setting.page_size))
    k_pages, v_pages = setting.pools(1 + pages.size, setting.dtype)
    counts = [-(-n // setting.page_size) for n in kv_lens]
    lengths = [length for length, _ in case.chunks]
    tail = (
        jnp.asarray(np.cumsum([0, *counts]), jnp.int32),  # cu_pages
        jnp.asarray(np.cumsum([0, *lengths]), jnp.int32),  # cu_q_lens
        jnp.asarray(kv_lens, jnp.int32),
    )
    attend = partial(
        prefill_attention, scale=spec.head_dim**-0.5, implementation=setting.implementation
    )
    return setting.seconds(
        lambda q, operands: attend(q, *operands),
        noise((case.tokens, spec.query_heads, spec.head_dim), setting.dtype),
        [(k_pages, v_pages, jnp.asarray(own), *tail) for own in pages],
        attention_flops(spec, case),
        "FLOP",
    )


def _cudnn(setting: Setting, case: PrefillCase) -> float:
    """Time the same attention by cuDNN, over contiguous K and V, which cuDNN needs."""
    spec, prompts, length = setting.spec, len(case.chunks), case.chunks[0][0]
    turns = _turns(setting.kv_bytes(case.tokens))
    shape = (prompts, length, spec.kv_heads, spec.head_dim)
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return setting.seconds(
        lambda q, operands: attend(q, *operands),
        noise((prompts, length, spec.query_heads, spec.head_dim), setting.dtype),
        [
            (noise(shape, setting.dtype, 2 * turn), noise(shape, setting.dtype, 2 * turn + 1))
            for turn in range(turns)
        ],
        attention_flops(spec, case),
        "FLOP",
    )
