#!/usr/bin/env bash
# Expected: in a chat template, schema.items is the entry "items" of a tool's JSON schema, as
# schema.type is the entry "type", and every engine for Jinja templates renders it alike.
#
# Happens: jinja2 looks for an attribute first and finds the method dict.items. schema.items renders
# as "<built-in method ...>", schema.items.type renders as nothing, without an error. The same for
# properties named keys, values, get, pop, update and copy. minijinja, on which servers in Rust
# stand, gives the entry. schema["items"] is right in both.
#
# Why it matters for serving: "items" is in the schema of every tool argument that is a list. One
# template makes two prompts, and the Python one tells the model nothing about the element type.
#
# Versions: jinja2 3.1.6 (sandboxed, as transformers sets it up), minijinja 3.1.0 on Python 3.11.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile \
    --disable-pip-version-check jinja2==3.1.6 minijinja==3.1.0 || exit 2
cd "$folder"

"$folder/venv/bin/python" - <<'PY'
import re
import sys
from importlib.metadata import version

import minijinja
from jinja2.sandbox import ImmutableSandboxedEnvironment

print("jinja2", version("jinja2"), "minijinja", version("minijinja"))
python = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
rust = minijinja.Environment(trim_blocks=True, lstrip_blocks=True)
schema = {"type": "array", "items": {"type": "string"}}
answers = {}
for template in ("{{ s.type }}", "{{ s.items.type }}", "{{ s.items }}", "{{ s['items'].type }}"):
    one = re.sub("0x[0-9a-f]+", "0x...", python.from_string(template).render(s=schema))
    other = rust.render_str(template, s=schema)
    answers[template] = one, other
    print(f"{template:23} jinja2 {one!r}, minijinja {other!r}")
holds = [one == other for one, other in answers.values()] == [True, False, False, True]
holds = holds and answers["{{ s.items.type }}"] == ("", "string")
print("schema.items is a method in one engine and the entry in the other" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
