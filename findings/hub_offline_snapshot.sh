#!/usr/bin/env bash
# Expected: snapshot_download(local_files_only=True) raises IncompleteSnapshotError when the cache
# misses requested files: its documentation says so, without a condition.
#
# Happens: it looks at a listing that only an earlier snapshot_download leaves behind. If the cache
# was filled by hf_hub_download (here: config.json alone), the folder comes back as complete, also
# for allow_patterns=["model.safetensors"], which names a file that is not there. hf_hub_download of
# that file does raise.
#
# Why it matters for serving: a look at a model's config fills the cache in this way. An offline
# server that asks for the snapshot to find out whether a model is there starts with a folder
# without weights, and fails later with another reason.
#
# Versions: huggingface_hub 2.4.0 on Python 3.11. The script plays the hub on a port of its own.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile \
    --disable-pip-version-check huggingface_hub==2.4.0 || exit 2
cd "$folder"

"$folder/venv/bin/python" - <<'PY'
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200)
        self.send_header("ETag", '"' + "b" * 40 + '"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", "2")
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(b"{}")

    def log_message(self, *words):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import huggingface_hub
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

print("huggingface_hub", huggingface_hub.__version__)
name = "someone/model"
hf_hub_download(name, "config.json", cache_dir="cache")
server.shutdown()
print("in the cache: config.json, by hf_hub_download")
seen = []
for patterns in (None, ["*.safetensors"], ["model.safetensors"]):
    try:
        folder = snapshot_download(
            name, cache_dir="cache", local_files_only=True, allow_patterns=patterns
        )
        seen.append(sorted(os.listdir(folder)))
    except LocalEntryNotFoundError as error:
        seen.append(type(error).__name__)
    print(f"snapshot_download(local_files_only=True, allow_patterns={patterns}): {seen[-1]}")
try:
    hf_hub_download(name, "model.safetensors", cache_dir="cache", local_files_only=True)
    single = "a path"
except LocalEntryNotFoundError as error:
    single = type(error).__name__
print("hf_hub_download('model.safetensors', local_files_only=True):", single)
holds = seen == [["config.json"]] * 3 and single == "LocalEntryNotFoundError"
print("an incomplete snapshot is returned as a snapshot" if holds else "CHANGED")
sys.exit(0 if holds else 1)
PY
