#!/usr/bin/env bash
# Expected: create(stream=True) that is answered with a whole completion as application/json, status
# 200, either gives that completion as a chunk or raises.
#
# Happens: the body is read as server-sent events, no line of it starts with "data:", and the loop
# ends at once: no chunk, no error. Without stream, an answer that is not JSON at all (text/html,
# 200) comes back as a plain str where a ChatCompletion is promised.
#
# Why it matters for serving: a server or proxy that does not know `stream` seems to a client to
# have generated nothing. Evaluations record empty answers, and load tests count a success with zero
# tokens.
#
# Versions: openai 3.57.0 with httpx2 2.16.2 on Python 3.11. The script's transport plays the
# server.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile \
    --disable-pip-version-check openai==3.57.0 httpx2==2.16.2 || exit 2
cd "$folder"

"$folder/venv/bin/python" - <<'PY'
import json
import sys

import httpx2
import openai

print("openai", openai.__version__, "httpx2", httpx2.__version__)


def client(body, kind):
    answer = httpx2.Response(200, content=body.encode(), headers={"content-type": kind})
    transport = httpx2.MockTransport(lambda request: answer)
    return openai.OpenAI(
        api_key="none", base_url="http://test/v1", http_client=httpx2.Client(transport=transport)
    )


message = {"role": "assistant", "content": "Paris"}
choice = {"index": 0, "message": message, "finish_reason": "stop"}
whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
chat = client(json.dumps(whole), "application/json").chat.completions
once = chat.create(model="m", messages=[]).choices[0].message.content
chat = client(json.dumps(whole), "application/json").chat.completions
chunks = list(chat.create(model="m", messages=[], stream=True))
page = client("<html></html>", "text/html").chat.completions.create(model="m", messages=[])
print("a whole completion as JSON: create gives", repr(once))
print("the same to create(stream=True):", len(chunks), "chunks, no error")
print("an HTML page to create: a", type(page).__name__)
holds = once == "Paris" and chunks == [] and isinstance(page, str)
print("an answer of the wrong kind is an empty stream" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
