#!/usr/bin/env bash
# Expected: lax.top_k(x, 1) and jnp.argmax(x) name the same index, that of the largest element, and
# of equal elements the first.
#
# Happens: argmax takes the first NaN. top_k orders bits: a NaN whose sign bit is set is smaller
# than every number, and 0.0 is larger than -0.0. lax.approx_max_k takes neither NaN. x86 processors
# set the sign bit in the NaN that inf - inf or 0 * inf makes, so this NaN is the usual one there.
#
# Why it matters for serving: greedy decoding through top_k(1) hides an overflow that argmax would
# show, and answers with an ordinary token. A check of the first of the top k for NaN finds nothing.
#
# Versions: jax 0.10.2 on Python 3.11, the same in jax 0.11.2 on Python 3.12.
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
negative_nan = np.array([0xFFC00000], np.uint32).view(np.float32)[0]
rows = {
    "NaN, sign clear": [1, np.nan, 2],
    "NaN, sign set": [1, negative_nan, 2],
    "zeros": [-0.0, 0.0],
}
seen = {}
for name, row in rows.items():
    x = jnp.asarray(np.array(row, np.float32))
    seen[name] = (
        int(jnp.argmax(x)),
        int(jax.lax.top_k(x, 1)[1][0]),
        int(jax.lax.approx_max_k(x, 1)[1][0]),
    )
    print(f"{name:16} {row}: argmax {seen[name][0]}, top_k {seen[name][1]},"
          f" approx_max_k {seen[name][2]}")
made = np.asarray(jax.jit(lambda v: v - v)(jnp.float32(jnp.inf)))
print("inf - inf on this processor has its sign bit", "set" if np.signbit(made) else "clear")
holds = seen == {"NaN, sign clear": (1, 1, 2), "NaN, sign set": (1, 2, 2), "zeros": (0, 1, 1)}
print("three ways to the largest element disagree" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
