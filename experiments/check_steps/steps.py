"""Runs a model's steps in one arithmetic, with one choice of implementations; the outcome is logits
and the pages that the steps leave."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.check_steps.batches import Batches
from experiments.common.loops import noise
from pallas_kernels.add_rms import api as add_rms
from pallas_kernels.kv_write import api as kv_write
from pallas_kernels.paged_attention import api as paged_attention
from pallas_kernels.prefill_attention import api as prefill_attention
from pallas_kernels.product import api as product
from pallas_kernels.swiglu import api as swiglu
from pdjax.core.kv_layout import NULL_PAGE
from pdjax.core.model_spec import ModelSpec
from pdjax.device.kv.pool import KVPool, PoolOwner
from pdjax.device.mesh import PREFILL_RULES, make_mesh
from pdjax.device.models.decoder import Params
from pdjax.device.models.registry import kv_layout
from pdjax.device.models.weights import random_params
from pdjax.device.packing import Packed
from pdjax.device.steps import decode, mixed, prefill
from pdjax.device.steps.sample import Undecided
from pdjax.interfaces.batches import IDLE_ROW, DecodeBatch, PrefillBatch
from pdjax.interfaces.steps import MixedStep

REFERENCE = "reference"
KERNELS = ("mosaic_gpu", "mosaic_tpu")
_OPERATIONS = (add_rms, kv_write, paged_attention, prefill_attention, product, swiglu)
_KERNEL = re.compile(r"custom_call @(?:mosaic_gpu\w*|tpu_custom_call)")
_LOWERED = {"gpu": "cuda"}  # a platform's name where programs are lowered


@dataclass(frozen=True)
class Outcome:
    """The outcome of a bucket's steps.

    Attributes:
      logits: f32[rows, V] of every step, without idle rows.
      pool: the pages after the last step.
    """

    logits: list[np.ndarray]
    pool: KVPool


def weights(spec: ModelSpec) -> Params:
    """Make random bfloat16 weights on the first device, where both phases' rules place them alike.

    The projections to q, k and v are halved, which rounds nothing. As `random_params` makes them,
    scores have a standard deviation of 9 and a query sees nearly one token only. Rounding errors
    then grow from layer to layer until no comparison is possible: after 16 layers of D = 512 the
    error is 0.4 to 0.98, against 0.03 to 0.07 with halved projections. Halved, scores deviate by
    2.25: a query still sees few enough tokens that a wrong page shows.
    """
    mesh = make_mesh(jax.devices()[:1], 1, 1)
    params = random_params(spec, mesh, PREFILL_RULES, [range(spec.num_layers)], "bfloat16")
    where = params.layers[0]["wqkv"].sharding
    halve = jax.jit(lambda x: x / 2, donate_argnums=0, out_shardings=where)
    layers = [layer | {"wqkv": halve(layer["wqkv"])} for layer in params.layers]
    return replace(params, layers=layers)


def upcast(params: Params) -> Params:
    """Convert the weights to float32."""
    where = jax.tree.map(lambda leaf: leaf.sharding, params)
    cast = partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float32))
    return jax.jit(cast, out_shardings=where)(params)


class Steps:
    """The program of a bucket, traced but not compiled yet.

    Args:
      spec: the model.
      params: its weights; the pool and the arithmetic have their type.
      page_size: tokens a page.
      implementation: implementation of all operations; see `implementations`.
      batches: the bucket's batches.

    Attributes:
      kernels: names of the Pallas kernels in the program.
    """

    def __init__(
        self,
        spec: ModelSpec,
        params: Params,
        page_size: int,
        implementation: str | None,
        batches: Batches,
    ) -> None:
        dtype = params.final_norm.dtype
        self._layout = kv_layout(spec, page_size, dtype.name)
        self._params, self._pages = params, batches.pages
        first = batches.steps[0]
        step: Any
        self._between: tuple[Any, ...] = ()
        if isinstance(first, PrefillBatch):
            step = prefill.make_prefill_step(params, spec, self._layout.tp)
        else:
            tick = first.rows if isinstance(first, MixedStep) else first
            mixes = tick is not first
            make = mixed.make_mixed_step if mixes else decode.make_decode_tick
            step = make(params, spec, self._layout, attention=None)
            rows = len(tick.tokens)
            no_tokens = jnp.zeros(rows, jnp.int32)
            undecided = Undecided(jnp.zeros((rows, spec.vocab_size)), no_tokens, no_tokens)
            carried = decode.Carried(jnp.zeros((rows, spec.model_dim), dtype), undecided)
            self._between = undecided if mixes else carried, no_tokens
        shape = spec.kv_heads, batches.pages, page_size, spec.head_dim
        pool: Any = [(jax.ShapeDtypeStruct(shape, dtype),) * 2] * spec.num_layers
        with implementations(implementation):
            self._lowered = step.jitted.lower(params, pool, *self._between, *_packed(first))
        self.kernels = _kernels_in(self._lowered.as_text())

    def compile(self) -> None:
        """Compile the program, in any thread; call it once before `run`."""
        self._compiled = self._lowered.compile()

    def run(self, batches: Batches) -> Outcome:
        """Run steps of the bucket, in order, on a pool of noise. Prefill must not read the noise;
        decode reads it as the context."""
        mesh = self._params.unembed.sharding.mesh
        owner = PoolOwner(self._layout, self._pages, mesh, PREFILL_RULES)
        _fill(owner.arrays)
        logits = []
        for batch in batches.steps:
            between = jax.tree.map(jnp.copy, self._between)  # a step donates the first one
            owner.arrays, *left = self._compiled(
                self._params, owner.arrays, *between, *_packed(batch)
            )
            logits.append(_logits(batch, left))
        return Outcome(logits, owner.arrays)


@contextmanager
def implementations(name: str | None) -> Iterator[None]:
    """Make programs that are traced inside the block use one implementation of every operation.

    The steps name only the implementation of decode attention and leave the others to the platform.
    So this replaces the tables of proven implementations meanwhile, as the kernels' own tests do.
    For float32 the original tables would give the reference, since kernels for Hopper refuse
    float32; for bfloat16 and for other kernels they would not.

    Args:
      name: "reference"; or a kernel's name, which runs wherever an operation has it and it takes
        the arguments, proven or not; or None for the proven ones.
    """
    with ExitStack() as stack:
        for api in _OPERATIONS if name is not None else ():
            where = () if name == REFERENCE else api.PLATFORMS.get(name or "", ())
            chosen = {_LOWERED.get(platform, platform): name for platform in where}
            stack.enter_context(mock.patch.dict(api._PROVEN, chosen, clear=True))
        yield


def proven(name: str | None) -> dict[str, dict[str, str]]:
    """Return operation -> platform -> the kernel that runs there, if it takes the arguments; see
    `implementations`."""
    with implementations(name):
        return {api.__name__.split(".")[1]: dict(api._PROVEN) for api in _OPERATIONS}


def _kernels_in(program: str) -> list[str]:
    """List the functions of a lowered program that call a kernel, without their numbers."""
    functions = program.split("func.func ")[1:]
    names = (function.split("(", 1)[0] for function in functions if _KERNEL.search(function))
    return sorted({re.sub(r"^.*@_*|_\d+$", "", name) for name in names})


def kv_error(found: KVPool, exact: KVPool) -> float:
    """Return the largest relative L2 error of a token's K or V over the heads of a layer. The whole
    pool counts, so that a write to a wrong slot is seen in both slots."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    return max(float(_token_error(*pair)) for pair in pairs)


@jax.jit
def _token_error(found: jax.Array, exact: jax.Array) -> jax.Array:
    """Return the largest error of a token in pages [K, P, S, H]; the null page does not count."""
    found, exact = (x.at[:, NULL_PAGE].set(1).astype(jnp.float32) for x in (found, exact))
    squares = [jnp.square(x).sum(axis=(0, 3)) for x in (found - exact, exact)]  # [P, S]
    return jnp.sqrt(squares[0] / squares[1]).max()


def _packed(batch: PrefillBatch | DecodeBatch | MixedStep) -> tuple[Packed, ...]:
    """The batch as arguments of its step."""
    if isinstance(batch, MixedStep):
        return prefill.pack(batch.chunks), decode.pack(batch.rows)
    return (decode.pack(batch) if isinstance(batch, DecodeBatch) else prefill.pack(batch),)


def _logits(batch: PrefillBatch | DecodeBatch | MixedStep, left: list[Any]) -> np.ndarray:
    """f32[rows, V] of what a step leaves beside the pool, without idle rows."""
    if isinstance(batch, PrefillBatch):
        return np.asarray(left[0].logits)
    if isinstance(batch, MixedStep):
        of_rows, of_chunks, _ = left
        return np.concatenate([_of_rows(batch.rows, of_rows), np.asarray(of_chunks.logits)])
    return _of_rows(batch, left[0].undecided)


def _of_rows(tick: DecodeBatch, undecided: Undecided) -> np.ndarray:
    return np.asarray(undecided.logits)[tick.positions[-1] != IDLE_ROW]


def _fill(pool: KVPool) -> None:
    """Fill a pool with noise as large as the K and V of `weights`: bfloat16 numbers, the same in
    every type."""
    for layer, planes in enumerate(pool):
        pool[layer] = tuple(_noise(x, 2 * layer + i) for i, x in enumerate(planes))


@partial(jax.jit, donate_argnums=0)
def _noise(pages: jax.Array, seed: int) -> jax.Array:
    return (1.5 * noise(pages.shape, jnp.bfloat16, seed)).astype(pages.dtype)
