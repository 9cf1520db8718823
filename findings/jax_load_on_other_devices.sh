#!/usr/bin/env bash
# Expected: serialize_executable.deserialize_and_load(..., execution_devices=devices) loads a program on
# those devices, as the name of the argument says. A program that is compiled for device 0 then serves
# device 1, too, and of several engines alike only one compiles.
#
# Happens: other devices than those that the program was compiled for raise KeyError: 0, a bare device
# id. Devices that contain them are taken, and the program stays where it was: an argument on the
# first of them is refused at the call. So the argument can only name again what the bytes say already.
#
# Why it matters for serving: with one engine a device the same program is compiled once for each of
# them, or kept once for each. (The client underneath can load it elsewhere: its deserialize_executable
# takes compile options with another device assignment, as JAX's own cache gives it on GPUs.)
#
# Versions: jax and jaxlib 0.10.2 on Python 3.11; the same with 0.11.2 on Python 3.12.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
cd "$folder"

cat >elsewhere.py <<'PY'
import sys

import jax
import jax.numpy as jnp
import jaxlib
from jax.experimental import serialize_executable
from jax.sharding import SingleDeviceSharding

jax.config.update("jax_num_cpu_devices", 2)
first, second = jax.devices()
where = SingleDeviceSharding(first)
x = jax.device_put(jnp.arange(4.0), where)
program = jax.jit(lambda x: x * 2, in_shardings=where, out_shardings=where).lower(x).compile()
blob = serialize_executable.serialize(program)
print("jax", jax.__version__, "jaxlib", jaxlib.version.__version__)


def tried(*devices):
    try:
        loaded = serialize_executable.deserialize_and_load(*blob, execution_devices=devices)
        came = loaded(jax.device_put(jnp.arange(4.0), devices[0]))
        return f"runs on {came.devices()}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"


seen = [tried(first), tried(second), tried(second, first)]
for name, what in zip(("the same device", "another one", "both, the other first"), seen):
    print(f"{name}: {what}")
runs, lost, refused = (each.partition(":")[0] for each in seen)
sys.exit(0 if runs.startswith("runs") and (lost, refused) == ("KeyError", "ValueError") else 1)
PY
export JAX_PLATFORMS=cpu
if "$folder/venv/bin/python" elsewhere.py; then
    echo "a serialized program is not moved to other devices by execution_devices"
else
    echo CHANGED
    exit 1
fi
