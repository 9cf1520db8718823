"""The fingerprint of a model: KV that one process has computed is another one's only if both would
compute the same."""

import os
from hashlib import blake2b
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdjax.core.model_spec import ModelSpec
from pdjax.core.origin import versions
from pdjax.device.kept.key import Unkept, source_digest
from pdjax.device.kv.checksums import checksums

_BYTES = 16


def fingerprint(params: Any, spec: ModelSpec, *facts: object) -> bytes:
    """16 bytes that differ, but for chance, between models whose KV may differ: in their weights,
    wherever they came from, in their shapes and embeddings of positions, in the kind of device, or
    in the code that computes. Where that has been changed since it was imported, nobody else has
    the same fingerprint.

    Each weight is summed up on its devices, at the rate of their memory.

    Args:
      params: the weights, in arrays.
      spec: the model.
      facts: what else KV follows from, each with a `repr` that is the same in every process.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = np.asarray(jax.jit(_sums)([leaf for _, leaf in leaves]))
    shapes = [(str(path), leaf.shape, str(leaf.dtype)) for path, leaf in leaves]
    kinds = {device.device_kind for device in leaves[0][1].sharding.device_set}
    told = (
        shapes,
        sums.tolist(),
        spec,
        sorted(kinds),
        versions("jax", "jaxlib"),
        _code(),
        facts,
    )
    return blake2b(repr(told).encode(), digest_size=_BYTES).digest()


def _code() -> str:
    try:
        return source_digest()
    except Unkept:
        return os.urandom(_BYTES).hex()


def _sums(arrays: list[jax.Array]) -> jax.Array:
    """u32[n]: the checksum of each array."""
    tall = [array if array.ndim > 1 else array.reshape(-1, 1) for array in arrays]
    return jnp.stack([checksums([array], 1)[0] for array in tall])
