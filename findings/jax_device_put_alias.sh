#!/usr/bin/env bash
# Expected: jax.device_put(x, may_alias=False) copies the numpy array x: its documentation says "If
# False, x will be copied". What is written to x afterwards does not reach the jax array.
#
# Happens: on the CPU the jax array shares the memory of x if x starts at a multiple of 64 bytes,
# with may_alias=False as without. jnp.asarray and jnp.array copy. numpy aligns to 16 bytes only, so
# the same program shares or copies by the luck of the allocation. make_array_from_callback shares
# too.
#
# Why it matters for serving: a host buffer of page tables or token ids that is filled anew each
# step changes the step already handed over, and only on some runs.
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


def buffer(offset):
    raw = np.zeros(256 + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    return raw[start : start + 256].view(np.float32)


here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
ways = {
    "device_put(x)": jax.device_put,
    "device_put(x, may_alias=False)": lambda x: jax.device_put(x, may_alias=False),
    "make_array_from_callback": lambda x: jax.make_array_from_callback(
        x.shape, here, lambda index: x[index]
    ),
    "jnp.asarray(x)": jnp.asarray,
}
shared = {}
for name, put in ways.items():
    for offset in (0, 4):
        x = buffer(offset)
        y = put(x).block_until_ready()
        x[:] = 7
        shared[name, offset] = float(y[0]) == 7
        print(f"{name:32} x at 64 n + {offset} bytes: {'shared' if shared[name, offset] else 'copied'}")
holds = [shared[name, 0] for name in ways] == [True, True, True, False]
holds = holds and not any(shared[name, 4] for name in ways)
print("an explicit request for a copy is not honoured" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
