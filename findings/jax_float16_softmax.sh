#!/usr/bin/env bash
# Expected: jax.nn.softmax of float16 logits sums to 1 within float16's rounding for any vocabulary:
# jnp.sum and jnp.mean of float16 accumulate in float32, and softmax subtracts the maximum first.
#
# Happens: the sum of exponentials is rounded to float16 before the division, and 65,520 equal
# logits make it inf. Every probability is 0, log_softmax is -inf everywhere, and logsumexp is inf.
# At 65,504 equal logits all is well.
#
# Why it matters for serving: vocabularies have 128,256 and more tokens. A flat enough distribution
# (a high temperature, an untrained or a masked head) in float16 turns into all zeros, not into NaN,
# and only above a size that small test models never have.
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
seen = {}
for size in (32_000, 65_504, 65_520, 128_256):
    logits = jnp.zeros(size, jnp.float16)
    total = float(jax.nn.softmax(logits).astype(jnp.float32).sum())
    lse = float(jax.nn.logsumexp(logits))
    low = float(jax.nn.log_softmax(logits)[0])
    seen[size] = total, lse
    print(f"{size:7} equal logits: softmax sums to {total:.4f}, logsumexp {lse:.3f}"
          f" (right: {np.log(size):.3f}), log_softmax {low:.3f}")
holds = all(abs(seen[size][0] - 1) < 0.01 for size in (32_000, 65_504))
holds = holds and all(seen[size] == (0, np.inf) for size in (65_520, 128_256))
print("softmax of a large flat float16 vocabulary is all zeros" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
