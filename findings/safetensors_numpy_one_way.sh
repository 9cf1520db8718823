#!/usr/bin/env bash
# Expected: safetensors.numpy.load reads what safetensors.numpy.save wrote, and load reads the same
# bytes as load_file.
#
# Happens: save takes the bfloat16 and float8 arrays of ml_dtypes. load_file reads bfloat16 back,
# load of the same bytes raises KeyError 'BF16', and float8_e4m3fn is read by neither: "module
# 'numpy' has no attribute 'float8_e4m3fn'". safetensors.flax.load stands on the same function.
#
# Why it matters for serving: a program that sends or caches weights as safetensors bytes finds at
# the other end, with the file already written, that only the path of a file works, and for fp8
# nothing.
#
# Versions: safetensors 0.8.0, ml_dtypes 0.6.0, numpy 2.4.6 on Python 3.11.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile \
    --disable-pip-version-check safetensors==0.8.0 ml_dtypes==0.6.0 numpy==2.4.6 || exit 2
cd "$folder"

"$folder/venv/bin/python" - <<'PY'
import sys

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import load, load_file, save_file

print("safetensors", safetensors.__version__, "ml_dtypes", ml_dtypes.__version__)
seen = {}
for name in ("float16", "bfloat16", "float8_e4m3fn"):
    dtype = np.float16 if name == "float16" else getattr(ml_dtypes, name)
    save_file({"a": np.array([1, 2], dtype)}, "a.safetensors")
    with open("a.safetensors", "rb") as file:
        data = file.read()
    for how, read in (
        ("load_file(path)", lambda: load_file("a.safetensors")),
        ("load(bytes)", lambda: load(data)),
    ):
        try:
            seen[name, how] = str(read()["a"].dtype)
        except (KeyError, AttributeError) as error:
            seen[name, how] = type(error).__name__
            print(f"   {error}")
        print(f"{name:14} written; {how:15} -> {seen[name, how]}")
holds = list(seen.values()) == [
    "float16", "float16", "bfloat16", "KeyError", "AttributeError", "KeyError",
]
print("save writes dtypes that load does not read" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
