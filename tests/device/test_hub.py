"""Models by their id on the Hugging Face Hub: the cache first, then the files that are needed."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from pdjax.device.checkpoints import hub
from pdjax.device.checkpoints.hub import fetch_from_hub, hub_id
from pdjax.device.checkpoints.open import open_checkpoint
from tests.helpers import tiny_models

COMMIT = "a" * 40
OTHERS = ("README.md", "pytorch_model.bin", "original/params.json", "onnx/model.safetensors")
BLACK_HOLE = "http://127.0.0.1:9"  # nobody listens there


class Hub:
    """A server that answers as the Hub does, from a directory."""

    def __init__(self, directory: Path) -> None:
        self.asked: list[str] = []
        self.files = files = {path.name: path.read_bytes() for path in directory.iterdir()}
        files |= dict.fromkeys(OTHERS, b"not needed")
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(body=True)

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def answer(self, body: bool) -> None:
                path = self.path.partition("?")[0]
                hub.asked.append(path)
                repository, _, rest = (
                    path.removeprefix("/api/models").removeprefix("/").partition("/resolve/")
                )
                if not repository.startswith("org/tiny"):
                    return self.reply(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
                if "/tree/" in path:
                    listed = [
                        {"type": "file", "path": name, "size": len(content), "oid": "b" * 40}
                        for name, content in files.items()
                    ]
                    return self.reply(200, json.dumps(listed).encode(), body, {})
                if path.startswith("/api/"):
                    siblings = [{"rfilename": name} for name in sorted(files)]
                    text = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}
                    return self.reply(200, json.dumps(text).encode(), body, {})
                content = files[rest.partition("/")[2]]
                headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
                return self.reply(200, content, body, headers | {"X-Repo-Commit": COMMIT})

            def reply(self, code: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
                self.send_response(code)
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    made = Hub(tiny_models.write("smollm2", tmp_path / "source"))
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_only_what_is_needed_is_fetched_and_the_cache_comes_first(
    server: Hub, monkeypatch: pytest.MonkeyPatch
):
    directory = fetch_from_hub("org/tiny", None, server.endpoint)
    assert not any(name in path for path in server.asked for name in OTHERS)
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    count = len(server.asked)
    assert fetch_from_hub("org/tiny", None, server.endpoint) == directory
    assert fetch_from_hub("org/tiny", COMMIT, server.endpoint) == directory
    assert len(server.asked) == count
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint = open_checkpoint("org/tiny")
    values = tiny_models.tensors("smollm2")["model.norm.weight"]
    np.testing.assert_array_equal(checkpoint.read("model.norm.weight"), values)
    open_checkpoint(f"org/tiny@{COMMIT}")
    with pytest.raises(ValueError, match=r"org/tiny@v2.*cache does not have it.*HF_HUB_OFFLINE"):
        open_checkpoint("org/tiny@v2")


def test_an_incomplete_cache_is_completed_or_said_to_be(server: Hub):
    directory = fetch_from_hub("org/tiny", "main", server.endpoint)
    (directory / "model-00002-of-00002.safetensors").unlink()
    message = r"'org/tiny': is no local path, the cache lacks model-00002-of-00002\.safetensors"
    with pytest.raises(ValueError, match=message):
        fetch_from_hub("org/tiny", None, BLACK_HOLE)
    assert fetch_from_hub("org/tiny", None, server.endpoint) == directory
    assert (directory / "model-00002-of-00002.safetensors").is_file()


@pytest.mark.parametrize("indexed", [False, True])
def test_weights_that_config_json_names_are_fetched(indexed: bool, server: Hub):
    """Under any name, and the shards that their index names."""
    files = {name: server.files.pop(name) for name in list(server.files) if "model" in name}
    if indexed:
        index = json.loads(files["model.safetensors.index.json"])
        place = {
            "model-00001-of-00002.safetensors": "a.st",
            "model-00002-of-00002.safetensors": "b",
        }
        server.files |= {new: files[old] for old, new in place.items()}
        index["weight_map"] = {key: place[name] for key, name in index["weight_map"].items()}
        server.files["mine.safetensors.index.json"] = json.dumps(index).encode()
        server.files["other.safetensors"] = b"not needed"
        name = "mine.safetensors.index.json"
    else:
        server.files["mine.safetensors"] = save(tiny_models.tensors("smollm2"))
        name = "mine.safetensors"
    config = json.loads(server.files["config.json"]) | {"transformers_weights": name}
    server.files["config.json"] = json.dumps(config).encode()
    directory = fetch_from_hub("org/tiny", None, server.endpoint)
    count = len(server.asked)
    assert fetch_from_hub("org/tiny", None, server.endpoint) == directory
    assert len(server.asked) == count  # the cache is complete
    assert not any("other.safetensors" in path for path in server.asked)
    weight = open_checkpoint(directory).read("model.norm.weight")
    np.testing.assert_array_equal(weight, tiny_models.tensors("smollm2")["model.norm.weight"])


def test_no_such_repository(server: Hub):
    with pytest.raises(ValueError, match=r"'org/absent': .*there is no such model or revision"):
        fetch_from_hub("org/absent", None, server.endpoint)


def test_no_network(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"'org/tiny': .*it cannot be fetched \(") as refusal:
        fetch_from_hub("org/tiny", None, BLACK_HOLE)
    assert "\n" not in str(refusal.value)
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: time.sleep(1))
    with pytest.raises(ValueError, match=r"has not answered within 0\.1 s"):
        fetch_from_hub("org/tiny", None, BLACK_HOLE)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("Qwen/Qwen2.5-0.5B@main", ("Qwen/Qwen2.5-0.5B", "main")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("name", None),
        ("/org/name", None),
        ("./org/name", None),
        ("org/name/more", None),
        ("org/..", None),
        ("org/name@", None),
        ("org/na me", None),
        ("org/name.gguf/", None),
    ],
)
def test_what_is_an_id(source: str, expected: tuple[str, str | None] | None):
    assert hub_id(source) == expected


def test_a_path_comes_before_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_models.write("llama", tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/name").spec.num_layers == 3
