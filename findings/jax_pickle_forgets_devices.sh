#!/usr/bin/env bash
# Expected: a jax.Array that went through pickle lies where it lay: on the same device, with the
# same sharding. copy.deepcopy, which follows the same protocol for most classes, keeps both. Or
# pickle refuses.
#
# Happens: it comes back whole on the default device, without a warning: an array sharded over four
# devices becomes four times as large on device 0, and an array of device 2 moves to device 0.
#
# Why it matters for serving: Ray, multiprocessing and queues pickle their arguments. Weights or
# pages handed to an actor gather on its first device, and the next jitted call moves or recompiles.
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
import copy
import pickle
import sys

import jax
import jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 4)
print("jax", jax.__version__, "with", jax.device_count(), "devices")
mesh = jax.make_mesh((4,), ("tp",))
spread = jax.device_put(jnp.arange(8), jax.NamedSharding(mesh, jax.P("tp")))
single = jax.device_put(jnp.arange(8), jax.devices()[2])
seen = []
for name, x in (("sharded over 4 devices", spread), ("on device 2", single)):
    pickled, copied = pickle.loads(pickle.dumps(x)), copy.deepcopy(x)
    print(f"{name}: pickle -> {pickled.sharding}")
    print(f"{name}: deepcopy -> {copied.sharding}")
    first = pickled.devices() == {jax.devices()[0]}
    seen.append(first and copied.devices() == x.devices())
print("pickle moves an array to the first device" if all(seen) else "CHANGED")
sys.exit(0 if all(seen) else 1)
PY
