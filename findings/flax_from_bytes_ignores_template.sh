#!/usr/bin/env bash
# Expected: flax.serialization.from_bytes(template, data) gives arrays with the template's shapes
# and dtypes, or refuses: the template says what the model needs.
#
# Happens: only the names are compared. A template of shape (5,) in bfloat16 takes a stored (2, 3)
# in float32 as it is. Moreover a big-endian numpy array is stored under the name of its native
# dtype, without swapping its bytes: [0, 1, 2] comes back as [0, 4.6e-41, 9.0e-44].
#
# Why it matters for serving: the checkpoint of another size of model loads without a word. It fails
# at the first product, or, where only the dtype differs, runs in float32 and takes twice the
# memory.
#
# Versions: flax 0.12.8, jax 0.10.2, numpy 2.4.6 on Python 3.11; the same in flax 0.12.12 with jax
# 0.11.2 on Python 3.12.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile \
    --disable-pip-version-check flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0 || exit 2
cd "$folder"

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

print("flax", flax.__version__, "jax", jax.__version__)
stored = serialization.to_bytes({"w": np.ones((2, 3), np.float32)})
back = serialization.from_bytes({"w": jnp.zeros(5, jnp.bfloat16)}, stored)["w"]
print("template (5,) bfloat16, stored (2, 3) float32 ->", back.shape, back.dtype)
try:
    serialization.from_bytes({"v": jnp.zeros(5)}, stored)
    names = "taken"
except ValueError:
    names = "ValueError"
print("template with another name:", names)
swapped = serialization.msgpack_restore(
    serialization.to_bytes({"w": np.arange(3, dtype=">f4")})
)["w"]
print("big-endian [0, 1, 2] ->", swapped, swapped.dtype)
holds = back.shape == (2, 3) and back.dtype == np.float32 and names == "ValueError"
holds = holds and not np.array_equal(swapped, [0, 1, 2])
print("shapes, dtypes and byte order go unchecked" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
