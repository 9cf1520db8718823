"""Naive attention: all tokens of one sequence, every score in a matrix. Parity tests compare the
model's arithmetic with Hugging Face through it, without a kernel, pool or page.

Dimension key: T tokens, N query heads, K KV heads, G = N/K, H head dim, V vocabulary.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.quantised import decode, encode
from pdjax.core.model_spec import ModelSpec, RopeSpec
from pdjax.device.mesh import DECODE_RULES, STAGE, TP
from pdjax.device.models import decoder
from pdjax.device.models.decoder import Params
from pdjax.device.models.family import Attend, LayerKind
from pdjax.device.models.registry import family_of


def dense_attend(
    spec: ModelSpec, length: int, rounded: str | None = None, exact: int | jax.Array = 0
) -> Attend:
    """Make causal attention over `length` tokens of one sequence, with positions from 0 on.

    `rounded` is a type: tokens from the `exact`-th on see K and V as `quantised.encode` rounds
    them.
    """
    place = jnp.arange(length)

    def rotate(x: jax.Array, rope: RopeSpec) -> jax.Array:
        frequencies, stretch = rope.frequencies(spec.head_dim)
        angles = np.arange(length)[:, None] * frequencies
        still = ((0, 0), (0, spec.head_dim // 2 - len(frequencies)))
        cos = np.pad(stretch * np.cos(angles), still, constant_values=1)
        cos = cos.astype(np.float32)[:, None, None]  # [T, 1, 1, H/2]
        sin = np.pad(stretch * np.sin(angles), still).astype(np.float32)[:, None, None]
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def attend(
        qkv: jax.Array, scale: jax.Array, bias: jax.Array | None, cache: None, kind: LayerKind
    ) -> tuple[jax.Array, None]:
        qkv = qkv * scale[:, None, None, None] + (0 if bias is None else bias)
        rotated = rotate(qkv[:, :, :-1], kind.rope)
        q, k, v = rotated[:, :, :-1], rotated[:, :, -1], qkv[:, :, -1]  # q [T, K, G, H]
        o = see(q, k, v, kind)
        if rounded is not None:
            k, v = (decode(*encode(x, rounded)) for x in (k, v))
            seen = see(q, k, v, kind)
            o = jnp.where((jnp.arange(length) >= exact)[:, None, None, None], seen, o)
        return o.reshape(length, -1, spec.head_dim), cache

    def see(q: jax.Array, k: jax.Array, v: jax.Array, kind: LayerKind) -> jax.Array:
        back = place[:, None] - place
        mask = (back >= 0) & (back < (kind.window or length))
        scale = spec.head_dim**-0.5 if kind.scale is None else kind.scale
        scores = jnp.einsum("qkgh,tkh->kgqt", q, k) * scale
        if kind.soft_cap is not None:
            scores = kind.soft_cap * jnp.tanh(scores / kind.soft_cap)
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        return jnp.einsum("kgqt,tkh->qkgh", weights, v)

    return attend


@functools.partial(jax.jit, static_argnames=("spec", "rounded"))
def dense_logits(
    params: Params,
    tokens: jax.Array,
    *,
    spec: ModelSpec,
    rounded: str | None = None,
    exact: int | jax.Array = 0,
) -> jax.Array:
    """Compute logits f32[T, V] of tokens i32[T] of one sequence, on one device; `rounded` and
    `exact` as in `dense_attend`. Tokens that pad a sequence at its end change no logits before
    them, so sequences of several lengths can share one compilation."""
    attend = dense_attend(spec, len(tokens), rounded, exact)
    nothing = [None] * len(params.layers)
    x = decoder.embed(params, tokens, spec=spec)
    x, _ = decoder.forward(params, x, nothing, attend, family_of(spec).kinds(spec), spec=spec)
    return decoder.unembed(params, x, spec=spec)


def staged_logits(
    params: Params,
    tokens: Sequence[int] | np.ndarray,
    *,
    spec: ModelSpec,
    mesh: Mesh,
) -> jax.Array:
    """Compute the logits on a ("stage", "tp") mesh, with weights sharded as in decode.

    The stages take turns, and every device ends with the logits.
    """
    vocab_axes = DECODE_RULES["vocab"]
    stages = mesh.shape[STAGE]
    in_specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
    kinds = family_of(spec).kinds(spec)[: len(params.layers)]

    def run(local: Params, tokens: jax.Array) -> jax.Array:
        attend = dense_attend(spec, len(tokens))
        x = decoder.embed(local, tokens, spec=spec, vocab_axes=vocab_axes)
        for stage in range(stages):
            nothing = [None] * len(local.layers)
            mine, _ = decoder.forward(
                local, x, nothing, attend, kinds, spec=spec, reduce=lambda y: lax.psum(y, TP)
            )
            x = lax.psum(jnp.where(lax.axis_index(STAGE) == stage, mine, 0), STAGE)
        return decoder.unembed(local, x, spec=spec, vocab_axes=vocab_axes)

    program = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(in_specs, PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return jax.jit(program)(params, np.asarray(tokens, np.int32))
