"""For any files of a model's directory, the answer within a second is a checkpoint with readable
tensors, or one line that names what is wrong."""

import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdjax.device.checkpoints.api import Checkpoint, tensor_shapes
from pdjax.device.checkpoints.hf_features import _NEUTRAL
from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.device.checkpoints.orbax import convert
from pdjax.formats.json_file import parse_json
from tests.helpers import tiny_models
from tests.helpers.mutate import answer, cases, integer, mutated, text

FIELDS = (
    *tiny_models.TINY_MODELS["llama"],
    *_NEUTRAL,
    *("head_dim", "rope_scaling", "rope_parameters", "original_max_position_embeddings"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("attention_bias", "quantization_config", "transformers_weights", "embedding_multiplier"),
)
ROPE_FIELDS = (
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor", "attention_factor", "attn_factor", "truncate"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "full_attention"),
)
NUMBERS = (0.0, -0.0, 0.5, 1.0, 4, 1e-9, 5e-324, 1e29, 1e308, float("nan"), float("inf"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.getLogger("pdjax").setLevel(logging.ERROR)
    yield
    logging.getLogger("pdjax").setLevel(logging.NOTSET)


def whole(draw: random.Random) -> int:
    """Draw an integer that Python's JSON can read: it refuses longer ones."""
    return min(integer(draw), 10**4000)


def json_value(draw: random.Random, depth: int = 2) -> Any:
    """Draw any value that a JSON file may hold."""
    kinds: list[Callable[[], Any]] = [
        lambda: whole(draw),
        lambda: draw.choice(NUMBERS),
        lambda: text(draw),
        lambda: draw.choice((None, True, False)),
        lambda: draw.choice(("yarn", "linear", "llama3", "default", "silu", "full_attention")),
        lambda: draw.randint(1, 200),
    ]
    if depth:
        kinds += [
            lambda: [json_value(draw, depth - 1) for _ in range(draw.randint(0, 4))],
            lambda: {
                draw.choice(ROPE_FIELDS): json_value(draw, depth - 1)
                for _ in range(draw.randint(0, 6))
            },
        ]
    return draw.choice(kinds)()


def changed(values: dict[str, Any], draw: random.Random, fields: tuple[str, ...]) -> dict[str, Any]:
    """Copy an object without a few fields, or with other values in them."""
    made = json.loads(json.dumps(values))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        name = draw.choice(fields) if draw.random() < 0.95 else text(draw)
        inner = [key for key, value in made.items() if isinstance(value, dict) and value]
        if inner and draw.random() < 0.5:
            target = made[draw.choice(inner)]
            target[draw.choice(list(target))] = json_value(draw)
        elif draw.random() < 0.1:
            made.pop(name, None)
        else:
            made[name] = json_value(draw)
    return made


def rewrite(path: Path, draw: random.Random, fields: tuple[str, ...]) -> None:
    """Change a JSON file: its values, or its bytes."""
    if draw.random() < 0.3:
        path.write_bytes(mutated(path.read_bytes(), draw))
        return
    made = changed(parse_json(path, path.read_text()), draw, fields)
    if draw.random() < 0.05:
        path.write_text("[" * draw.choice((10, 900, 5000, 100_000)))
        return
    path.write_text(json.dumps(made))


def look(directory: Path) -> None:
    """Open a directory, and read a row of each tensor of the checkpoint."""

    def opened() -> Checkpoint:
        checkpoint = open_checkpoint(directory)
        for name, shape in tensor_shapes(checkpoint.spec).items():
            assert checkpoint.read(name, slice(0, 1)).shape == (1, *shape[1:])
        return checkpoint

    answer(opened)


def test_configurations(tmp_path: Path):
    directories = [tiny_models.write(name, tmp_path / name) for name in ("llama_yarn", "qwen2")]
    generation = {"eos_token_id": [2, 5], "bos_token_id": 1}
    for seed in cases(240):
        draw = random.Random(seed)
        directory = draw.choice(directories)
        file = directory / "config.json"
        kept = file.read_bytes()
        if draw.random() < 0.15:
            (directory / "generation_config.json").write_text(json.dumps(generation))
            rewrite(directory / "generation_config.json", draw, tuple(generation))
        else:
            rewrite(file, draw, FIELDS)
        look(directory)
        file.write_bytes(kept)
        (directory / "generation_config.json").unlink(missing_ok=True)


def test_indexes(tmp_path: Path):
    directory = tiny_models.write("smollm2", tmp_path / "m")
    index = directory / "model.safetensors.index.json"
    content = index.read_bytes()
    names = tuple(json.loads(content)["weight_map"])
    for seed in cases(70):
        draw = random.Random(seed)
        rewrite(index, draw, ("weight_map", "metadata"))
        if draw.random() < 0.5:
            values = json.loads(content)
            values["weight_map"] = changed(values["weight_map"], draw, names)
            index.write_text(json.dumps(values))
        look(directory)
        index.write_bytes(content)


def test_headers_of_safetensors(tmp_path: Path):
    directory = tiny_models.write("smollm2", tmp_path / "m")
    file = min(directory.glob("*.safetensors"))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for seed in cases(100):
        draw = random.Random(seed)
        if draw.random() < 0.4:
            file.write_bytes(mutated(content[: 8 + length], draw) + content[8 + length :])
        elif draw.random() < 0.2:
            file.write_bytes(mutated(content, draw))
        else:
            made = json.loads(json.dumps(header))
            name = draw.choice(list(made))
            if draw.random() < 0.3:
                made[name] = json_value(draw)
            else:
                field = draw.choice(("dtype", "shape", "data_offsets"))
                made[name][field] = draw.choice(
                    (json_value(draw), [whole(draw), whole(draw)], header[draw.choice([*header])])
                )
            raw = json.dumps(made).encode()
            file.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
        look(directory)
    file.write_bytes(content)


def test_converted_directories(tmp_path: Path):
    """Change the spec, the metadata of orbax and of the arrays, and the arrays themselves."""
    plain = open_checkpoint(tiny_models.write("llama_yarn", tmp_path / "m"))
    directory = tmp_path / "out"
    convert(plain, directory, "float32")
    spec = directory / "model_spec.json"
    fields = tuple(json.loads(spec.read_text()))
    stored = sorted(path for path in (directory / "weights").rglob("*") if path.is_file())
    for seed in cases(24):
        draw = random.Random(seed)
        if draw.random() < 0.6:
            kept, file = spec.read_bytes(), spec
            rewrite(spec, draw, fields)
        else:
            file = draw.choice(stored)
            kept = file.read_bytes()
            file.write_bytes(mutated(kept, draw))
        look(directory)
        file.write_bytes(kept)
    shutil.rmtree(directory / "weights" / "layer_1")
    assert "layer_1/ is missing" in str(answer(lambda: open_checkpoint(directory)))


def test_nothing_of_the_above_is_left(tmp_path: Path):
    """The unchanged directory opens; without that the other tests would prove nothing."""
    checkpoint = open_checkpoint(tiny_models.write("llama_yarn", tmp_path))
    values = tiny_models.tensors("llama_yarn")["model.norm.weight"]
    np.testing.assert_array_equal(checkpoint.read("model.norm.weight"), values)
