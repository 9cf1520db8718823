"""Checkpoints that `pdjax convert` writes: the same model after the round trip, whole or not at
all.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from pdjax.convert import save_checkpoint
from pdjax.core.kv_layout import split_layers
from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.device.checkpoints.orbax import SPEC_FILE, convert
from pdjax.device.mesh import DECODE_RULES, make_mesh
from pdjax.device.models.weights import load_params
from pdjax.text.byte_tokenizer import byte_tokenizer
from tests.helpers import tiny_models


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tiny_models.write("qwen2_yarn", tmp_path / "source")
    Backend(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(
        str(directory / "tokenizer.json")
    )
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return directory


def test_round_trip(source: Path, tmp_path: Path):
    original = open_checkpoint(source)
    convert(original, tmp_path / "out", "float32")
    copy = open_checkpoint(tmp_path / "out")
    assert copy.spec == original.spec
    for name, values in tiny_models.tensors("qwen2_yarn").items():
        np.testing.assert_array_equal(copy.read(name), values)
        cols = slice(1, 40) if values.ndim == 2 else slice(None)
        part = values[3:19, cols] if values.ndim == 2 else values[3:19]
        np.testing.assert_array_equal(copy.read(name, slice(3, 19), cols), part)
    mesh = make_mesh(jax.devices()[:4], 2, 2)
    placed = [
        load_params(c, mesh, DECODE_RULES, split_layers(3, 2), "float32") for c in (original, copy)
    ]
    jax.tree.map(np.testing.assert_array_equal, *placed)
    found = [original.tokenizer(), copy.tokenizer()]
    tokenizers = [tokenizer for tokenizer in found if tokenizer is not None]
    assert len(tokenizers) == 2
    assert len({str(t.encode("abba")) for t in tokenizers}) == 1
    assert (
        len({str(t.apply_chat_template([{"role": "user", "content": "ba"}])) for t in tokenizers})
        == 1
    )
    assert tokenizers[0].eos_token_ids == tokenizers[1].eos_token_ids == (2,)


def test_no_tokenizer_is_kept_as_none(source: Path, tmp_path: Path):
    (source / "tokenizer.json").unlink()
    convert(open_checkpoint(source), tmp_path / "out", "float32")
    copy = open_checkpoint(tmp_path / "out")
    assert copy.tokenizer() is None
    assert copy.spec.eos_token_ids == (2,)


def test_bfloat16(source: Path, tmp_path: Path):
    convert(open_checkpoint(source), tmp_path / "out", "bfloat16")
    found = open_checkpoint(tmp_path / "out").read("model.embed_tokens.weight")
    values = tiny_models.tensors("qwen2_yarn")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(found, values.astype(ml_dtypes.bfloat16))


def test_arrays_in_memory(source: Path, tmp_path: Path):
    arrays = tiny_models.tensors("qwen2_yarn")
    spec, tokenizer = open_checkpoint(source).spec, byte_tokenizer()
    mixed = {name: jnp.asarray(a) if a.ndim == 2 else a for name, a in arrays.items()}
    save_checkpoint(tmp_path / "out", spec, mixed, tokenizer)
    copy = open_checkpoint(tmp_path / "out")
    assert copy.spec == spec
    for name, values in arrays.items():
        np.testing.assert_array_equal(copy.read(name), values)
    restored = copy.tokenizer()
    assert restored is not None
    assert restored.encode("né") == tokenizer.encode("né")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"tensor model\.norm\.weight is missing"),
        (
            {"model.norm.weight": np.ones(3, np.float32)},
            r"has shape \(3,\); .*\(64,\)",
        ),
        (
            {"model.norm.weight": np.ones(64, np.int32)},
            r"weight is int32; must be of a float",
        ),
        ({"model.extra": np.ones(3)}, r"tensor 'model\.extra' .* has no place"),
    ],
)
def test_arrays_that_are_no_model(
    changes: dict[str, Any], message: str, source: Path, tmp_path: Path
):
    arrays = tiny_models.tensors("qwen2_yarn") | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(ValueError, match=rf"model='arrays in memory': .*{message}"):
        save_checkpoint(tmp_path / "out", open_checkpoint(source).spec, arrays)
    assert not (tmp_path / "out").exists()


def test_orbax_itself_reads_the_folder(source: Path, tmp_path: Path):
    import orbax.checkpoint as ocp

    convert(open_checkpoint(source), tmp_path / "out", "float32")
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((tmp_path / "out" / "weights" / "layer_2").resolve())
    name = "model.layers.2.mlp.up_proj.weight"
    np.testing.assert_array_equal(tree[name], tiny_models.tensors("qwen2_yarn")[name])


def test_a_failed_conversion_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoint = open_checkpoint(source)

    def fail(*_: object) -> None:
        raise ValueError("the disk is gone")

    monkeypatch.setattr(checkpoint, "read", fail)
    with pytest.raises(ValueError, match="the disk is gone"):
        convert(checkpoint, tmp_path / "out", "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_refusals(source: Path, tmp_path: Path):
    checkpoint = open_checkpoint(source)
    with pytest.raises(ValueError, match=r"dtype='int8': allowed: float32, bfloat16"):
        convert(checkpoint, tmp_path / "out", "int8")
    with pytest.raises(ValueError, match="exists already"):
        convert(checkpoint, source, "float32")


def test_damaged_directories(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    convert(open_checkpoint(source), out, "float32")
    spec = json.loads((out / SPEC_FILE).read_text())
    (out / SPEC_FILE).write_text(json.dumps(spec | {"mlp_dim": 80}))
    with pytest.raises(ValueError, match=r"gate_proj\.weight has shape \(96, 64\)"):
        open_checkpoint(out)
    (out / SPEC_FILE).write_text(json.dumps(spec | {"num_layers": 4}))
    with pytest.raises(ValueError, match=r"tensor model\.layers\.3\.\S+ cannot be read"):
        open_checkpoint(out)
    (out / SPEC_FILE).write_text(json.dumps(spec | {"experts": 4}))
    with pytest.raises(ValueError, match="not the architecture that this version"):
        open_checkpoint(out)
    (out / SPEC_FILE).write_text(json.dumps(spec))
    chunk = max((out / "weights" / "layer_1").rglob("*"), key=lambda path: path.stat().st_size)
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with pytest.raises(ValueError, match=r"tensor model\.layers\.1\.\S+ cannot be read"):
        load_params(
            open_checkpoint(out),
            make_mesh(jax.devices()[:1], 1, 1),
            DECODE_RULES,
            split_layers(3, 1),
            "float32",
        )
    (out / "weights").rename(out / "elsewhere")
    with pytest.raises(ValueError, match="weights/ is missing"):
        open_checkpoint(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2**40}, r"num_layers=1099511627776: must be at least 1 and at most"),
        ({"num_layers": "3"}, r"num_layers='3': must be an integer"),
        ({"num_layers": True}, r"num_layers=True: must be an integer"),
        ({"head_dim": 2**40}, r"head_dim=1099511627776: must be"),
        ({"norm_eps": float("nan")}, r"norm_eps=nan: must be positive"),
        ({"tied": 1}, r"tied=1: must be true or false"),
        ({"rope": 3}, r"rope=3; allowed: an object"),
        ({"rope": {"theta": 1, "kind": "yarn", "original_context": 8}}, r"rope\.theta=1: yarn"),
        ({"rope": {"factor": 0}}, r"rope\.factor=0: must be positive"),
        ({"rope": {"kind": ["x"]}}, r"rope\.kind=\['x'\]: allowed are plain"),
        ({"rope": {"thetas": 1}}, r"unknown field 'thetas'"),
        ({"eos_token_ids": 3}, r"eos_token_ids=3; allowed: a list"),
        ({"eos_token_ids": ["x"]}, r"eos_token_ids='x': must be an integer"),
    ],
)
def test_malformed_specs(changes: dict[str, Any], message: str, tmp_path: Path):
    spec = dataclasses.asdict(ModelSpec(101, 3, 64, 96, 4, 2, 16, 64))
    (tmp_path / SPEC_FILE).write_text(json.dumps(spec | changes))
    with pytest.raises(ValueError, match=rf"model_spec\.json: .*{message}") as refusal:
        open_checkpoint(tmp_path)
    assert "\n" not in str(refusal.value)
