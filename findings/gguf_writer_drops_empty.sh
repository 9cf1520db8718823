#!/usr/bin/env bash
# Expected: GGUFWriter.add_string(key, "") and add_array(key, []) write the key with an empty value;
# GGUF has both, and add_uint32(key, 0) and add_bool(key, False) write theirs.
#
# Happens: the key is not written at all and nothing is said. add_string tests the value for truth,
# add_array its length. add_key_value with the same empty string writes it.
#
# Why it matters for serving: a value that was emptied on purpose (a chat template, a list of
# merges, a prefix) comes out as absent, and a reader takes its default for an absent key. A copy of
# a file made field by field is no copy.
#
# Versions: gguf 0.19.0, numpy 2.4.6 on Python 3.11.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile \
    --disable-pip-version-check gguf==0.19.0 numpy==2.4.6 || exit 2
cd "$folder"

"$folder/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

from gguf import GGUFReader, GGUFValueType, GGUFWriter

print("gguf", version("gguf"))
writer = GGUFWriter("a.gguf", "llama")
writer.add_string("test.string", "")
writer.add_array("test.array", [])
writer.add_uint32("test.number", 0)
writer.add_bool("test.bool", False)
writer.add_string("test.word", "a")
writer.add_key_value("test.string_by_key_value", "", GGUFValueType.STRING)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
fields = GGUFReader("a.gguf").fields
names = ("string", "array", "number", "bool", "word", "string_by_key_value")
there = {name: f"test.{name}" in fields for name in names}
for name in names:
    value = repr(fields[f"test.{name}"].contents()) if there[name] else "absent"
    print(f"test.{name:20} {value}")
holds = [name for name in names if not there[name]] == ["string", "array"]
print("empty values are not written" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
