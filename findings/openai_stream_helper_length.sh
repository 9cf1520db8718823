#!/usr/bin/env bash
# Expected: chat.completions.stream(...) followed by get_final_completion() gives the completion,
# with finish_reason "length" if max_tokens cut it, as chat.completions.create does.
#
# Happens: it raises LengthFinishReasonError at the chunk that ends the stream, although no response
# format was asked for and there is nothing to parse. "content_filter" raises likewise.
#
# Why it matters for serving: reaching max_tokens is an ordinary end. Programs that move from create
# to the stream helper lose the answer they already received in full, at a rate that depends on the
# length of the answers.
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


def chunk(delta, reason=None):
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    body = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return "data: " + json.dumps({**body, "choices": [choice]}) + "\n\n"


seen = {}
for reason in ("stop", "length"):
    body = chunk({"role": "assistant", "content": "Paris"}) + chunk({}, reason)
    body += "data: [DONE]\n\n"
    plain = client(body, "text/event-stream").chat.completions.create(
        model="m", messages=[], stream=True
    )
    text = "".join(c.choices[0].delta.content or "" for c in plain)
    try:
        with client(body, "text/event-stream").chat.completions.stream(
            model="m", messages=[]
        ) as stream:
            seen[reason] = stream.get_final_completion().choices[0].message.content
    except openai.LengthFinishReasonError as error:
        seen[reason] = type(error).__name__
    print(f"finish_reason {reason}: create(stream=True) {text!r}, stream() {seen[reason]!r}")
holds = seen == {"stop": "Paris", "length": "LengthFinishReasonError"}
print("an answer that reached max_tokens is an exception" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
