"""How much host memory beside the weights, and how much time, does loading take in each format?

Writes a model of random weights to disk in each format, a little at a time; a new process loads
each onto the CPU. The memory that loading takes is the process's peak resident memory, less that
before, less the weights themselves. The project allows the two largest tensors and 256 MB.

  python -m experiments.load_memory --folder=/tmp/models
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import flags
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

from experiments.common.shapes import MODELS
from experiments.common.tables import table
from pdjax.core.kv_layout import split_layers
from pdjax.core.model_spec import ModelSpec, RopeSpec
from pdjax.device.checkpoints.api import tensor_shapes, tensors
from pdjax.device.checkpoints.huggingface import HuggingFaceCheckpoint
from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.device.checkpoints.orbax import convert
from pdjax.device.mesh import PREFILL_RULES, make_mesh
from pdjax.device.models.weights import load_params
from pdjax.flags import new_flags, run

MB = 1e6
ALLOWED_BESIDE = 256 * MB
FORMATS = ("safetensors", "orbax", "gguf-q8_0", "gguf-f16")

FLAGS = new_flags()
_MODEL = flags.DEFINE_enum("model", "llama_1b", list(MODELS), "shapes", flag_values=FLAGS)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float32"], "element type on the device", flag_values=FLAGS
)
_FORMATS = flags.DEFINE_multi_enum(
    "format", list(FORMATS), FORMATS, "formats to load", flag_values=FLAGS
)
_FOLDER = flags.DEFINE_string(
    "folder", None, "where models are kept; a temporary one unless given", flag_values=FLAGS
)
_LOAD = flags.DEFINE_string("load", None, "load this model, print JSON, end", flag_values=FLAGS)


def load(source: str, dtype: str) -> dict[str, float]:
    """Load a model in this process.

    Returns:
      `seconds`; `weights`, bytes on the device; `extra`, peak bytes of resident memory, without the
      weights and the memory before; `largest`, bytes of the two largest tensors in `dtype`.
    """
    mesh = make_mesh(jax.devices("cpu")[:1], stages=1, tp=1)
    jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices("cpu")[0]))
    checkpoint = open_checkpoint(source)
    spec = checkpoint.spec
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    start = time.perf_counter()
    layers = split_layers(spec.num_layers, 1)
    params = load_params(checkpoint, mesh, PREFILL_RULES, layers, dtype)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    itemsize = np.dtype(dtype).itemsize
    sizes = sorted(itemsize * int(np.prod(shape)) for shape in tensor_shapes(spec).values())
    return {
        "seconds": seconds,
        "weights": weights,
        "extra": _resident("VmHWM") - before - weights,
        "largest": sum(sizes[-2:]),
    }


def _resident(field: str) -> int:
    """Read a field of this process's status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def write_model(kind: str, spec: ModelSpec, folder: Path) -> Path:
    """Write a model of random weights in format `kind` unless it is there; return its path."""
    path = folder / (f"{kind}.gguf" if kind.startswith("gguf") else kind)
    if path.exists():
        return path
    if kind == "safetensors":
        _write_safetensors(spec, path)
    elif kind == "orbax":
        plain = HuggingFaceCheckpoint(write_model("safetensors", spec, folder))
        convert(plain, path, "bfloat16")
    else:
        _write_gguf(spec, path, GGMLQuantizationType[kind.removeprefix("gguf-").upper()])
    return path


def _write_safetensors(spec: ModelSpec, directory: Path) -> None:
    directory.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.model_dim,
        "intermediate_size": spec.mlp_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.query_heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.context,
        "rope_theta": spec.rope.theta,
        "tie_word_embeddings": spec.tied,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, shape in tensor_shapes(spec).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensor_shapes(spec).values():
            for block in _noise(int(np.prod(shape))):
                file.write(block.astype(ml_dtypes.bfloat16).tobytes())


def _noise(size: int) -> Iterator[np.ndarray]:
    """Yield random numbers f32[size], a megabyte at a time."""
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 18).astype(np.float32)
    for start in range(0, size, len(block)):
        yield block[: min(len(block), size - start)]


def _write_gguf(spec: ModelSpec, path: Path, kind: GGMLQuantizationType) -> None:
    writer = GGUFWriter(path, "llama")
    numbers = {
        "llama.block_count": spec.num_layers,
        "llama.context_length": spec.context,
        "llama.embedding_length": spec.model_dim,
        "llama.feed_forward_length": spec.mlp_dim,
        "llama.attention.head_count": spec.query_heads,
        "llama.attention.head_count_kv": spec.kv_heads,
        "llama.attention.key_length": spec.head_dim,
        "llama.attention.value_length": spec.head_dim,
        "tokenizer.ggml.eos_token_id": 2,
    }
    for key, value in numbers.items():
        writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", spec.norm_eps)
    writer.add_float32("llama.rope.freq_base", spec.rope.theta)
    entries = [(gguf, spec.shape(tensor.dims)) for _, gguf, tensor in tensors(spec)]
    fills: list[Callable[[int], Iterator[bytes]]] = []
    for name, shape in entries:
        matrix = len(shape) == 2
        used = kind if matrix else GGMLQuantizationType.F32
        block, block_bytes = GGML_QUANT_SIZES[used]
        nbytes = int(np.prod(shape)) // block * block_bytes
        dtype: Any = np.dtype(np.float32)
        writer.add_tensor_info(name, shape, dtype, nbytes, raw_dtype=used)
        fills.append(_q8_0 if used == GGMLQuantizationType.Q8_0 else _floats(used))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for (_, shape), fill in zip(entries, fills, strict=True):
        start = file.tell()
        for part in fill(int(np.prod(shape))):
            file.write(part)
        writer.write_padding(file, file.tell() - start)
    writer.close()


def _q8_0(size: int) -> Iterator[bytes]:
    blocks = np.random.default_rng(0).integers(0, 256, (1 << 13, 34), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)  # the scale
    for start in range(0, size // 32, len(blocks)):
        yield blocks[: min(len(blocks), size // 32 - start)].tobytes()


def _floats(kind: GGMLQuantizationType) -> Callable[[int], Iterator[bytes]]:
    dtype = np.float16 if kind == GGMLQuantizationType.F16 else np.float32
    return lambda size: (block.astype(dtype).tobytes() for block in _noise(size))


def measure(kind: str, spec: ModelSpec, folder: Path, dtype: str) -> dict[str, float]:
    """Write the model and load it in a new process; see `load`."""
    path = write_model(kind, spec, folder)
    command = [sys.executable, "-m", "experiments.load_memory", f"--load={path}"]
    command.append(f"--dtype={dtype}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{kind}: loading failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print a line for each format."""
    if _LOAD.value is not None:
        print(json.dumps(load(_LOAD.value, _DTYPE.value)))
        return
    # RoPE is plain: its scaling changes no weight.
    base = MODELS[_MODEL.value]
    spec = ModelSpec(**{**vars(base), "rope": RopeSpec(theta=base.rope.theta)})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(_FOLDER.value or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for kind in _FORMATS.value:
            found = measure(kind, spec, folder, _DTYPE.value)
            allowed = found["largest"] + ALLOWED_BESIDE
            sizes = [f"{found[name] / MB:.0f}" for name in ("weights", "extra")]
            rows.append([kind, *sizes, f"{allowed / MB:.0f}", f"{found['seconds']:.1f}"])
        print(table(["format", "weights MB", "beside MB", "allowed MB", "seconds"], rows))


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
