#!/usr/bin/env bash
# Expected: ~, -, abs, << and >> of a numpy array of ml_dtypes' uint4 or int4 give an array of that
# type, as + and * do and as jax does: ~uint4(3) is 12, and -uint4(3) is 13.
#
# Happens: numpy finds no such operation for the type, casts to int8 without a word and answers in
# int8: ~uint4(3) is -4, -uint4(3) is -3, int4(1) << 3 is 8 and -int4(-8) is 8, numbers that the
# type does not have. A scalar's minus, unlike an array's, wraps: -ml_dtypes.int4(-8) is -8.
#
# Why it matters for serving: packing and unpacking of 4-bit weights is made of these operators. On
# the host and on the device the same expression gives different numbers and another dtype.
#
# Versions: ml_dtypes 0.6.0, numpy 2.4.6, jax 0.10.2 on Python 3.11; the same with numpy 2.5.5 and
# jax 0.11.2 on Python 3.12.
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

print("ml_dtypes", ml_dtypes.__version__, "numpy", np.__version__, "jax", jax.__version__)
cases = [
    ("~uint4(3)", ml_dtypes.uint4, 3, lambda x: ~x),
    ("-uint4(3)", ml_dtypes.uint4, 3, lambda x: -x),
    ("-int4(-8)", ml_dtypes.int4, -8, lambda x: -x),
    ("int4(1) << int4(3)", ml_dtypes.int4, 1, lambda x: x << (x + x + x)),
    ("int4(7) + int4(7)", ml_dtypes.int4, 7, lambda x: x + x),
]
seen = []
for name, dtype, value, operate in cases:
    host = operate(np.array([value], dtype))
    device = operate(jnp.asarray(np.array([value], dtype)))
    seen.append((int(host[0]), str(host.dtype), int(device[0]), str(device.dtype)))
    print(f"{name:19} numpy {seen[-1][0]:3} {seen[-1][1]:5} jax {seen[-1][2]:3} {seen[-1][3]}")
print("-int4(-8) as a scalar:", -ml_dtypes.int4(-8))
holds = seen == [
    (-4, "int8", 12, "uint4"),
    (-3, "int8", 13, "uint4"),
    (8, "int8", -8, "int4"),
    (8, "int8", -8, "int4"),
    (-2, "int4", -2, "int4"),
]
print("operators on 4-bit arrays answer in int8" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
