#!/usr/bin/env bash
# Expected: jnp.asarray(x, dtype=jnp.int8) and jnp.asarray(x).astype(jnp.int8) give the same numbers
# for a numpy float array x, and int4 behaves as int8 does.
#
# Happens: the first casts in numpy and wraps around: 300 becomes 44, and 8 in int4 becomes -8. The
# second casts in XLA and saturates: 127 and 7. A detour over int32 wraps again.
#
# Why it matters for serving: a weight that rounds to one more than the largest code is ordinary in
# quantisation. One spelling clips it as meant, the other flips its sign, and which one runs depends
# on whether the array was already on a device.
#
# Versions: jax 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6 on Python 3.11; the same in jax 0.11.2 with
# numpy 2.5.5 on Python 3.12.
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
import ml_dtypes
import numpy as np

print("jax", jax.__version__, "ml_dtypes", ml_dtypes.__version__, "numpy", np.__version__)
x = np.array([7, 8, 100, 127, 128, 300], np.float32)
print("x =", x)
seen = {}
for name in ("int8", "int4"):
    dtype = jnp.dtype(name)
    seen[name] = [
        np.asarray(y).astype(int).tolist()
        for y in (
            jnp.asarray(x, dtype=dtype),
            jnp.asarray(x).astype(dtype),
            jnp.asarray(x).astype(jnp.int32).astype(dtype),
        )
    ]
    for how, y in zip(("asarray(x, dtype)", "asarray(x).astype", "... over int32"), seen[name]):
        print(f"{name} {how:18} {y}")
holds = seen == {
    "int8": [[7, 8, 100, 127, -128, 44], [7, 8, 100, 127, 127, 127], [7, 8, 100, 127, -128, 44]],
    "int4": [[7, -8, 4, -1, 0, -4], [7, 7, 7, 7, 7, 7], [7, -8, 4, -1, 0, -4]],
}
print("one spelling wraps around, the other saturates" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
