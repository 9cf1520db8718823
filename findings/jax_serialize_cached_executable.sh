#!/usr/bin/env bash
# Expected: jax.experimental.serialize_executable writes a compiled program down such that another
# process can load and run it, wherever XLA's executable has come from.
#
# Happens: on the CPU that holds only for a program which XLA has compiled in this process. One that
# JAX has read from its persistent compilation cache runs here, and is serialized without an error,
# to a smaller blob; deserialize_and_load takes the blob, too. Its first call raises NOT_FOUND: the
# functions of its fusions are gone. So whether a serialized program is any good depends on whether
# the cache happened to be warm.
#
# Why it matters for serving: ahead-of-time programs are written once, at the end of a build or a
# first start, often with the cache on. The next start then loads all of them and fails at the first
# request.
#
# Versions: jax and jaxlib 0.10.2 on Python 3.11; the same with 0.11.2 on Python 3.12. (On an H200 a cached
# program can be serialized.)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
cd "$folder"

cat >one_start.py <<'PY'
import pickle
import sys

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

jax.config.update("jax_compilation_cache_dir", "cache")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
x = jnp.arange(4.0)
program = jax.jit(lambda x: jnp.tanh(x) * 2 + x).lower(x).compile()
blob = serialize_executable.serialize(program)
print(len(blob[0]), "bytes; it runs here:", program(x).shape == (4,))
with open(sys.argv[1], "wb") as file:
    pickle.dump(blob, file)
PY
cat >load.py <<'PY'
import pickle
import sys

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

with open(sys.argv[1], "rb") as file:
    program = serialize_executable.deserialize_and_load(*pickle.load(file))
try:
    print("loaded; it gives", program(jnp.arange(4.0)).tolist())
except Exception as error:
    print("loaded; its call raises", str(error).splitlines()[0])
    sys.exit(3)
PY
export JAX_PLATFORMS=cpu
python=$folder/venv/bin/python
"$python" -c 'import jax, jaxlib; print("jax", jax.__version__, "jaxlib", jaxlib.version.__version__)'
echo "compiled now:"
"$python" one_start.py compiled
"$python" load.py compiled
echo "read from the compilation cache:"
"$python" one_start.py cached
status=0
"$python" load.py cached || status=$?
if ((status == 3)); then
    echo "a cached program is serialized without its functions"
else
    echo CHANGED
    exit 1
fi
