#!/usr/bin/env bash
# Expected: a compiled program on the CPU is a piece of machine code: the process maps a few more regions
# of memory for it (code, constants), however many operations it has.
#
# Happens: a program of eight small layers maps 33 regions of its own, one of a single product 2 to 3: their
# number grows with the kernels in it. They stay as long as the program does. Linux lets a process have 65,530
# by default (vm.max_map_count), so some 2,000 such programs are all that it can hold, long before memory is
# short; larger models get there sooner.
#
# Why it matters for serving: one model server compiles a program for each shape of a step, a test suite
# those of hundreds of configurations in one process.
#
# Versions: jax and jaxlib 0.10.2 on Python 3.11; the same with 0.11.2 on Python 3.12.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    "${JAX:-jax==0.10.2}" "${JAXLIB:-jaxlib==0.10.2}" numpy==2.4.6 || exit 2
cd "$folder"

cat >maps.py <<'PY'
import sys

import jax
import jax.numpy as jnp
import jaxlib


def regions():
    with open("/proc/self/maps") as file:
        return sum(1 for _ in file)


def layers(count, number):
    def step(x, w):
        for _ in range(count):
            x = jax.nn.softmax(jnp.tanh(x @ w) * number) + jnp.sort(x, axis=-1)
        return x

    return jax.jit(step)


x, w = jnp.ones((16, 64)), jnp.ones((64, 64))
layers(1, 0).lower(x, w).compile()
print("jax", jax.__version__, "jaxlib", jaxlib.version.__version__)
kept, each = [], []
for count in (0, 8):
    before = regions()
    for number in range(1, 21):
        program = layers(count, number) if count else jax.jit(lambda x, w, n=number: x @ w + n)
        kept.append(program.lower(x, w).compile())
    each.append((regions() - before) / 20)
    print(f"{count or 'no'} layers: {each[-1]:.1f} regions a program")
sys.exit(0 if each[1] > 20 else 1)
PY
export JAX_PLATFORMS=cpu
if "$folder/venv/bin/python" maps.py; then
    echo "a compiled program takes tens of a process's 65,530 regions of memory"
else
    echo CHANGED
    exit 1
fi
