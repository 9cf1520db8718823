#!/usr/bin/env bash
# Expected: 1e-40 is a positive float32. It is above zero, it is the maximum of [0, 1e-40], and a
# sort puts it after 0.
#
# Happens: XLA on the CPU compares and multiplies with subnormal numbers as zeros but keeps their
# bits. `x > 0` is False for the 1e-40 that the array still prints, sort leaves [1e-40, 0, -1e-40]
# as it is, and argmax of [0, 1e-40] says 0. lax.top_k compares bits and says 1: the two disagree.
#
# Why it matters for serving: a probability threshold, a top-p or a temperature below 1.2e-38 from a
# request counts as zero in some operations and not in others, and a check in numpy before the call
# does not see it.
#
# Versions: jax 0.10.2 on Python 3.11 (CPU), the same in jax 0.11.2 on Python 3.12.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile \
    --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0 || exit 2
cd "$folder"

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__)
tiny = np.float32(1e-40)
x = jnp.float32(tiny)
print("numpy: 1e-40 > 0 is", bool(tiny > 0), "| jax: the array prints", x, "and x > 0 is", bool(x > 0))
print("jax: 2 * x is", 2 * x)
print("jnp.sort([1e-40, 0, -1e-40]) =", jnp.sort(jnp.array([tiny, 0, -tiny], jnp.float32)))
pair = jnp.array([0, tiny], jnp.float32)
best, top = int(jnp.argmax(pair)), int(jax.lax.top_k(pair, 1)[1][0])
print("[0, 1e-40]: argmax", best, "| lax.top_k", top, "| np.argmax", int(np.argmax(np.asarray(pair))))
order = np.asarray(jnp.sort(jnp.array([tiny, 0, -tiny], jnp.float32)))
holds = not bool(x > 0) and order[0] > order[2] and best == 0 and top == 1
print("subnormal numbers compare as zeros, in some operations" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
