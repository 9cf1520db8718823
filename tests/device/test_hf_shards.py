"""Which file of a directory holds which tensor: single files, shards, indexes that are wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pdjax.device.checkpoints.huggingface import HuggingFaceCheckpoint
from pdjax.device.checkpoints.safetensors_file import SafetensorsFile
from tests.helpers import tiny_models

EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"


def tensors(factor: float = 1.0) -> dict[str, np.ndarray]:
    return {name: values * factor for name, values in tiny_models.tensors("llama").items()}


def write(
    directory: Path,
    files: dict[str, dict[str, np.ndarray]],
    index: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    directory.mkdir()
    text = json.dumps(tiny_models.TINY_MODELS["llama"] | config)
    (directory / "config.json").write_text(text)
    for name, held in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        save_file(held, directory / name)
    if index is not None:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (directory / "model.safetensors.index.json").write_text(text)
    return directory


def halves() -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
    """All tensors in two files, and the index of them."""
    found = tensors()
    files = {
        f"{part}.safetensors": {name: found[name] for name in list(found)[place::2]}
        for place, part in enumerate("ab")
    }
    return files, {name: file for file, held in files.items() for name in held}


def assert_right(directory: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(directory)
    for name, values in tensors().items():
        np.testing.assert_array_equal(checkpoint.read(name), values)


@pytest.mark.parametrize("stale", ["a.safetensors", "b.safetensors"])
def test_the_file_counts_that_the_index_names(stale: str, tmp_path: Path):
    files, index = halves()
    files[stale] = tensors(0) | files[stale]
    assert_right(write(tmp_path / "m", files, index))


def test_a_shard_that_the_index_does_not_name_is_not_read(tmp_path: Path):
    files, index = halves()
    directory = write(tmp_path / "m", files | {"c.safetensors": tensors(0)}, index)
    (directory / "d.safetensors").write_bytes(b"nothing")
    assert_right(directory)


def test_a_single_file_counts_more_than_an_index(tmp_path: Path):
    files, index = halves()
    stale = {name: {key: v * 0 for key, v in held.items()} for name, held in files.items()}
    assert_right(write(tmp_path / "m", stale | {"model.safetensors": tensors()}, index))


def test_the_configuration_may_name_the_file(tmp_path: Path):
    files = {"model.safetensors": tensors(0), "sub/w.safetensors": tensors()}
    assert_right(write(tmp_path / "m", files, transformers_weights="sub/w.safetensors"))


def test_shards_may_lie_in_a_folder(tmp_path: Path):
    files, index = halves()
    files = {f"sub/{name}": held for name, held in files.items()}
    assert_right(write(tmp_path / "m", files, {key: f"sub/{name}" for key, name in index.items()}))


def test_a_tensor_that_the_index_leaves_out_is_taken_from_the_one_shard_that_holds_it(
    tmp_path: Path,
):
    files, index = halves()
    del index[NORM]
    assert_right(write(tmp_path / "one", files, index))
    both = {name: held | {NORM: tensors()[NORM]} for name, held in files.items()}
    with pytest.raises(ValueError, match=r"does not name model\.norm\.weight, which .* holds"):
        HuggingFaceCheckpoint(write(tmp_path / "two", both, index))


def test_a_tensor_that_is_not_where_the_index_says(tmp_path: Path):
    files, index = halves()
    index[EMBED] = "b.safetensors" if index[EMBED] == "a.safetensors" else "a.safetensors"
    message = r"weight_map says that 'model\.embed_tokens\.weight' is in .* does not hold it"
    with pytest.raises(ValueError, match=message):
        HuggingFaceCheckpoint(write(tmp_path / "m", files, index))


@pytest.mark.parametrize(
    "name", ["../out/a.safetensors", "/etc/a.safetensors", "..", "", "a\\b", "a\nb", "x" * 999]
)
def test_an_index_names_no_file_outside_the_directory(name: str, tmp_path: Path):
    files, index = halves()
    directory = write(tmp_path / "m", files, index | {EMBED: name})
    with pytest.raises(ValueError, match=r"weight_map: .*; allowed: a file inside the directory"):
        HuggingFaceCheckpoint(directory)
    with pytest.raises(ValueError, match="transformers_weights"):
        HuggingFaceCheckpoint(write(tmp_path / "n", files, index, transformers_weights=name))


@pytest.mark.parametrize("index", [{}, {"a": 3}, {"a": None}, {"a": ["b"]}])
def test_malformed_indexes(index: dict[str, Any], tmp_path: Path):
    with pytest.raises(ValueError, match=r"weight_map=.*allowed: tensor names to file names"):
        HuggingFaceCheckpoint(write(tmp_path / "m", halves()[0], index))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "pytorch_model.bin is PyTorch's format"),
        ("pytorch_model-00001-of-00002.bin", "is PyTorch's format"),
        ("model.fp16.safetensors", "model.fp16.safetensors is a variant"),
        ("model.safetensors.index.fp16.json", "holds neither"),
        ("model-00001-of-00002.safetensors", "a shard without its index"),
        ("consolidated.safetensors", "Mistral's own format"),
        ("consolidated.00.pth", "Meta's own format"),
        ("adapter_model.safetensors", "an adapter"),
        ("model-q4_0.gguf", "a GGUF file; name the file itself"),
        ("weights.safetensors", "rename it to model.safetensors"),
    ],
)
def test_weights_of_other_kinds_are_refused_by_name(name: str, message: str, tmp_path: Path):
    directory = write(tmp_path / "m", {})
    (directory / name).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        HuggingFaceCheckpoint(directory)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path):
    directory = write(tmp_path / "m", {})
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (directory / "model.safetensors").write_text(text)
    with pytest.raises(ValueError, match="a Git LFS pointer stands in its place"):
        HuggingFaceCheckpoint(directory)


@pytest.mark.parametrize("spelling", ["", "model.model."])
@pytest.mark.parametrize("every", [1, 2])
def test_names_without_their_prefix_or_with_two(spelling: str, every: int, tmp_path: Path):
    found = {
        name.replace("model.", spelling, 1) if place % every == 0 else name: values
        for place, (name, values) in enumerate(tensors().items())
    }
    assert_right(write(tmp_path / "m", {"model.safetensors": found}))


def test_of_two_spellings_the_full_one_counts(tmp_path: Path):
    for place, other in enumerate(("norm.weight", "model.model.norm.weight")):
        found = {other: tensors(0)[NORM]} | tensors()
        assert_right(write(tmp_path / str(place), {"model.safetensors": found}))


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "header is no object"),
        (b"{", "not a readable"),
        (b"\xff{}", "not a readable"),
        (b"[" * 5000, "not a readable"),
        ({"x": 3}, "tensor x: 3"),
        ({"x": {}}, "allowed: dtype, shape, data_offsets"),
        ({"x": entry(shape=[-1])}, "malformed"),
        ({"x": entry(shape=[True])}, "malformed"),
        ({"x": entry(shape=[2.0])}, "malformed"),
        ({"x": entry(dtype=3)}, "dtype=3"),
        ({"x": entry(dtype="F\n32")}, r"dtype='F\\n32'"),
        ({"x\ny": entry()}, r"tensor 'x\\ny': its name is no name"),
        ({"x" * 999: entry()}, "its name is no name"),
        ({"x": entry(shape=[1 << 61, 1 << 61])}, "do not fill"),
        ({"x": entry(shape=[3])}, "do not fill"),
        ({"x": entry(offsets=[8, 0])}, "data_offsets"),
        ({"x": entry(offsets=[0, 8, 8])}, "data_offsets"),
        ({"x": entry(offsets=[4, 12])}, "begins at byte"),
        ({"x": entry(), "y": entry()}, "begins at byte"),
        ({"x": entry(shape=[1], offsets=[0, 4])}, "tensors that end at byte"),
        ({"x": entry(shape=[4], offsets=[0, 16])}, "tensors that end at byte"),
    ],
)
def test_damaged_headers(header: Any, message: str, tmp_path: Path):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(ValueError, match=message) as refusal:
        SafetensorsFile(tmp_path / "x")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("length", [0, 3, 8, 9, 2**40, 2**64 - 1])
def test_lengths_of_headers(length: int, tmp_path: Path):
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little")[: max(length, 3)])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        SafetensorsFile(tmp_path / "x")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path):
    save_file({"x": np.ones((64, 64), np.float32)}, tmp_path / "x")
    file = SafetensorsFile(tmp_path / "x")
    with (tmp_path / "x").open("r+b") as shrinking:
        shrinking.truncate(1000)
    with pytest.raises(ValueError, match=r"ends at byte 1000, inside a tensor"):
        file.read("x", slice(None), slice(None))


def test_a_file_that_is_replaced_stays_the_one_that_was_opened(tmp_path: Path):
    save_file({"x": np.ones((2, 2), np.float32)}, tmp_path / "x")
    file = SafetensorsFile(tmp_path / "x")
    save_file({"x": np.zeros((2, 2), np.float32)}, tmp_path / "new")
    shutil.move(tmp_path / "new", tmp_path / "x")
    np.testing.assert_array_equal(file.read("x", slice(1, 2), slice(None)), [[1, 1]])
