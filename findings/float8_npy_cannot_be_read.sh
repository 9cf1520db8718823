#!/usr/bin/env bash
# Expected: what jnp.save writes, jnp.load reads. For bfloat16 it does, dtype included.
#
# Happens: float8_e4m3fn comes back as raw bytes of dtype |V1, and float8_e5m2 is written without
# complaint into a file that neither jnp.load nor np.load reads: "descr is not a valid dtype
# descriptor: '<f1'". int4 comes back as |V1 too, one byte an element.
#
# Why it matters for serving: fp8 weights, scales or pages that were dumped for later are lost with
# their type, or cannot be opened at all, and it shows only at reading.
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
import io
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

print("jax", jax.__version__, "ml_dtypes", ml_dtypes.__version__, "numpy", np.__version__)
seen = {}
for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4"):
    for how, save, load in (("jnp", jnp.save, jnp.load), ("np", np.save, np.load)):
        file = io.BytesIO()
        save(file, np.asarray(jnp.ones(3, name)))
        file.seek(0)
        try:
            seen[name, how] = str(load(file).dtype)
        except ValueError as error:
            seen[name, how] = "ValueError"
            print(f"   {error}")
        print(f"{name:14} {how}.save, {how}.load: {seen[name, how]}")
holds = seen == {
    ("bfloat16", "jnp"): "bfloat16",
    ("bfloat16", "np"): "|V2",
    ("float8_e4m3fn", "jnp"): "|V1",
    ("float8_e4m3fn", "np"): "|V1",
    ("float8_e5m2", "jnp"): "ValueError",
    ("float8_e5m2", "np"): "ValueError",
    ("int4", "jnp"): "|V1",
    ("int4", "np"): "|V1",
}
print("float8 arrays do not survive a .npy file" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
