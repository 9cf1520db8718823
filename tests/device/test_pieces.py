"""Tensors of all experts, whatever pieces files keep them in: slices, and files that lack one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pdjax.device.checkpoints.api import Checkpoint
from pdjax.device.checkpoints.arrays import ArrayCheckpoint
from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.device.checkpoints.orbax import convert
from pdjax.device.checkpoints.pieces import runs
from tests.helpers import tiny_models
from tests.parity import gguf_models

GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"


def hugging_face(name: str, directory: Path, found: dict[str, np.ndarray]) -> Path:
    tiny_models.write(name, directory)
    save_file(found, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def separate(directory: Path) -> Checkpoint:
    return open_checkpoint(tiny_models.write("mixtral", directory))


def fused(directory: Path) -> Checkpoint:
    return open_checkpoint(hugging_face("mixtral", directory, tiny_models.tensors("mixtral")))


def gguf(directory: Path) -> Checkpoint:
    return open_checkpoint(gguf_models.write("mixtral", directory / "m.gguf"))


def converted(directory: Path) -> Checkpoint:
    convert(separate(directory / "from"), directory / "to", "float32")
    return open_checkpoint(directory / "to")


def in_memory(directory: Path) -> Checkpoint:
    return ArrayCheckpoint(separate(directory).spec, tiny_models.tensors("mixtral"))


@pytest.mark.parametrize("made", [separate, fused, gguf, converted, in_memory])
def test_slices(made: Callable[[Path], Checkpoint], tmp_path: Path):
    checkpoint = made(tmp_path)
    for name in (GATE_UP, DOWN):
        stored = tiny_models.tensors("mixtral")[name]
        rows = stored.reshape(-1, stored.shape[-1])
        np.testing.assert_array_equal(checkpoint.read(name), rows)
        # Within a part, from part to part, over all of an expert, and nothing.
        for first, last in ((3, 9), (90, 100), (50, 290), (len(rows) - 1, len(rows)), (7, 7)):
            part = checkpoint.read(name, slice(first, last), slice(5, 17))
            np.testing.assert_array_equal(part, rows[first:last, 5:17])


def test_runs_end_where_matrices_do():
    assert list(runs(slice(2, 9), 4, 3)) == [(0, slice(2, 4)), (1, slice(0, 4)), (2, slice(0, 1))]
    assert list(runs(slice(None), 4, 1)) == [(0, slice(0, 4))]
    assert list(runs(slice(12, 12), 4, 3)) == [(2, slice(4, 4))]


PIECE = "model.layers.1.block_sparse_moe.experts.3.w3.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({PIECE: None}, rf"tensor {PIECE} is missing; expected shape \(96, 64\)"),
        ({PIECE: np.zeros((96, 63))}, rf"{PIECE} has shape \(96, 63\); .* makes it \(96, 64\)"),
        (
            {GATE_UP: np.zeros((4, 192, 64))},
            r"experts\.0\.w1.* \(one of 8 such\) has no place",
        ),
        (
            {"model.layers.1.block_sparse_moe.experts.4.w1.weight": np.zeros((96, 64))},
            r"experts\.4\.w1\.weight' \(one of 1 such\) has no place",
        ),
    ],
)
def test_a_file_that_lacks_a_piece_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
):
    found = tiny_models.by_expert("mixtral") | changes
    found = {name: np.float32(x) for name, x in found.items() if x is not None}
    with pytest.raises(ValueError, match=message):
        open_checkpoint(hugging_face("mixtral", tmp_path, found))


def test_experts_of_another_number_are_refused(tmp_path: Path):
    found = tiny_models.tensors("mixtral")
    found[GATE_UP] = found[GATE_UP].reshape(8, 96, 64)
    with pytest.raises(ValueError, match=r"has shape \(8, 96, 64\); .* makes it \(4, 192, 64\)"):
        open_checkpoint(hugging_face("mixtral", tmp_path, found))
