#!/usr/bin/env bash
# Expected: Response.iter_lines() of httpx ends a line at CR, LF or CR LF, as server-sent events and
# JSON lines define it, and as requests and aiohttp do with bytes.
#
# Happens: it decodes first and then splits as str.splitlines does: also at U+2028, U+2029, U+0085
# and more. JSON may hold all of these unescaped, and servers that write JSON without ASCII escapes
# send them so.
#
# Why it matters for serving: a client that reads a token stream with iter_lines works until a model
# writes a line separator. Then one event becomes two lines, the first no longer JSON. With bytes of
# the same answer the event is whole.
#
# Versions: httpx 0.28.1 and httpx2 2.16.2 on Python 3.11.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile \
    --disable-pip-version-check httpx==0.28.1 httpx2==2.16.2 || exit 2
cd "$folder"

"$folder/venv/bin/python" - <<'PY'
import json
import sys

import httpx
import httpx2

seen = []
event = "data: " + json.dumps({"text": "a\u2028b\u2029c\u0085d"}, ensure_ascii=False)
for library in (httpx, httpx2):
    answer = library.Response(200, content=(event + "\n\n").encode())
    lines = list(answer.iter_lines())
    print(library.__name__, library.__version__, "iter_lines:", ascii(lines))
    whole = answer.content.splitlines()
    print("   the same as bytes:", len(whole), "lines:", ascii(whole[0].decode()))
    seen.append((len([line for line in lines if line]), len([line for line in whole if line])))
holds = seen == [(4, 1), (4, 1)]
print("one event is cut into four lines" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
