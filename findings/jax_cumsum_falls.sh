#!/usr/bin/env bash
# Expected: the running sum of numbers that are not negative never falls, as numpy.cumsum's does
# not: adding something that is not negative can only round to the same number or to a larger one.
#
# Happens: jnp.cumsum adds in a tree, so neighbours come from different orders of rounding. Over the
# sorted probabilities of a vocabulary of 128,256, hundreds of its steps go down.
#
# Why it matters for serving: top-p takes the tokens whose running sum is below p, and inverse
# sampling runs searchsorted over the running sum. Both need it sorted: a binary search over a
# falling sequence and a comparison with it disagree about which token is the last.
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

print("jax", jax.__version__, "numpy", np.__version__)
found = {}
for size in (1_000, 32_000, 128_256):
    probabilities = jax.nn.softmax(3 * jax.random.normal(jax.random.key(1), (size,)))
    probabilities = jnp.sort(probabilities)[::-1]
    sums = {
        "jnp.cumsum": np.asarray(jnp.cumsum(probabilities)),
        "jit(jnp.cumsum)": np.asarray(jax.jit(jnp.cumsum)(probabilities)),
        "np.cumsum": np.cumsum(np.asarray(probabilities)),
    }
    for name, values in sums.items():
        found[name, size] = int((np.diff(values) < 0).sum())
        print(f"{name:16} over {size:7} probabilities: {found[name, size]} steps fall")
holds = found["jnp.cumsum", 128_256] > 0 and found["jit(jnp.cumsum)", 128_256] > 0
holds = holds and found["np.cumsum", 128_256] == 0
print("a cumulative sum of non-negative numbers falls" if holds else "CHANGED: it never falls")
sys.exit(0 if holds else 1)
PY
