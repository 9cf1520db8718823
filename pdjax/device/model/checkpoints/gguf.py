"""GGUF: one file with metadata, tokenizer and (usually quantised) tensors, as llama.cpp writes it.

Tensors are dequantised to float32, only the rows and blocks asked for. For architecture "llama",
llama.cpp stores the rows of the Q and K projections so that the two dimensions that RoPE rotates
together are neighbours; the reader puts them back, half a head apart, which is the convention of
Hugging Face and of this project.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from pdjax.device.model.checkpoints.api import ALL, EMBED, FINAL_NORM, UNEMBED, check_tensors
from pdjax.model_spec import ModelSpec, RopeSpec
from pdjax.tokenizer import Tokenizer
from pdjax.tokenizer_gguf import Metadata, eos_token_ids, open_gguf

ARCHITECTURES = ("llama", "qwen2")
ROPE_FACTORS = "rope_freqs.weight"

_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd.weight": EMBED, "output_norm.weight": FINAL_NORM, "output.weight": UNEMBED}


class GGUFCheckpoint:
    """A GGUF file of architecture "llama" or "qwen2".

    Raises:
      ValueError: the file is unreadable, of another architecture, or uses a feature or a
        quantisation that is not supported.
    """

    def __init__(self, path: Path) -> None:
        reader = open_gguf(path)
        self._meta = Metadata(path, reader)
        self._tensors = {_canonical(tensor.name): tensor for tensor in reader.tensors}
        self._spec = _spec(path, self._meta, self._tensors)
        shapes = {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        check_tensors(path, self._spec, shapes, ignored=(ROPE_FACTORS,))
        _check_types(path, reader)
        self._interleaved = self._meta.text("general.architecture") == "llama"

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self._meta)

    def read(self, name: str, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        """See `Checkpoint.read`; always float32."""
        tensor = self._tensors[name]
        if tensor.data.ndim == 1:
            return np.array(dequantize(tensor.data, tensor.tensor_type)[rows], np.float32)
        block, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
        first, last, _ = cols.indices(int(tensor.shape[0]))
        blocks = slice(first // block, -(-last // block))
        unit = block_bytes // tensor.data.dtype.itemsize  # elements of `data` a block
        stored = tensor.data[self._rows(name, rows, tensor)]
        stored = np.ascontiguousarray(stored[:, blocks.start * unit : blocks.stop * unit])
        values = dequantize(stored, tensor.tensor_type)
        offset = first - blocks.start * block
        return np.array(values[:, offset : offset + last - first], np.float32)

    def _rows(self, name: str, rows: slice, tensor: ReaderTensor) -> slice | np.ndarray:
        if not (self._interleaved and name.endswith(("q_proj.weight", "k_proj.weight"))):
            return rows
        # Stored row (head, pair i, half j) holds row (head, j, i) of the projection.
        half = self._spec.head_dim // 2
        stored = np.arange(int(tensor.shape[1])).reshape(-1, half, 2)
        return stored.swapaxes(1, 2).reshape(-1)[rows]


def _canonical(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _PARTS:
        return f"model.layers.{match[1]}.{_PARTS[match[2]]}.{match[3]}"
    return _OUTSIDE.get(name, name)


def _spec(path: Path, meta: Metadata, tensors: dict[str, ReaderTensor]) -> ModelSpec:
    arch = meta.text("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"model={str(path)!r}: general.architecture={arch!r}; "
            f"allowed: {', '.join(ARCHITECTURES)}"
        )
    heads, width = (
        meta.integer(f"{arch}.attention.head_count"),
        meta.integer(f"{arch}.embedding_length"),
    )
    head_dim = meta.integer(f"{arch}.attention.key_length", width // max(heads, 1))
    context = meta.integer(f"{arch}.context_length")
    _refuse_features(path, meta, arch, head_dim, context)
    if EMBED not in tensors:
        raise ValueError(f"model={str(path)!r}: tensor token_embd.weight is missing")
    return ModelSpec(
        vocab_size=int(tensors[EMBED].shape[1]),
        num_layers=meta.integer(f"{arch}.block_count"),
        model_dim=width,
        mlp_dim=meta.integer(f"{arch}.feed_forward_length"),
        query_heads=heads,
        kv_heads=meta.integer(f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        context=context,
        rope=_rope(path, meta, arch, head_dim, tensors.get(ROPE_FACTORS)),
        norm_eps=meta.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        tied=UNEMBED not in tensors,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in tensors,
        eos_token_ids=eos_token_ids(meta),
    )


def _refuse_features(path: Path, meta: Metadata, arch: str, head_dim: int, context: int) -> None:
    allowed: dict[str, tuple[Any, str]] = {
        "attention.value_length": (head_dim, "the key length"),
        "rope.dimension_count": (head_dim, "the head dimension"),
        "expert_count": (0, "no experts"),
    }
    for key, (value, why) in allowed.items():
        found = meta.integer(f"{arch}.{key}", value)
        if found != value:
            raise ValueError(f"model={str(path)!r}: {arch}.{key}={found}; allowed: {value} ({why})")
    window = meta.integer(f"{arch}.attention.sliding_window", 0)
    if 0 < window < context:
        raise ValueError(
            f"model={str(path)!r}: {arch}.attention.sliding_window={window}; "
            f"allowed: none, or at least the context of {context}"
        )


def _rope(
    path: Path, meta: Metadata, arch: str, head_dim: int, factors: ReaderTensor | None
) -> RopeSpec:
    theta = meta.number(f"{arch}.rope.freq_base", 10000.0)
    if factors is not None:
        return _llama3_rope(path, theta, head_dim, np.asarray(factors.data, np.float64))
    kind = meta.text(f"{arch}.rope.scaling.type", "none")
    factor = meta.number(
        f"{arch}.rope.scaling.factor", meta.number(f"{arch}.rope.scale_linear", 1.0)
    )
    if kind == "none":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=factor)
    if kind == "yarn":
        context = meta.integer(f"{arch}.rope.scaling.original_context_length")
        scale = meta.number(f"{arch}.rope.scaling.attn_factor", 1.0)
        scale *= 0.1 * float(np.log(max(factor, 1.0))) + 1.0
        return RopeSpec(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_context=context,
            attention_factor=scale,
        )
    raise ValueError(
        f"model={str(path)!r}: {arch}.rope.scaling.type={kind!r}; allowed: none, linear, yarn"
    )


def _llama3_rope(path: Path, theta: float, head_dim: int, factors: np.ndarray) -> RopeSpec:
    """llama.cpp bakes Llama 3's scaling into divisors of the frequencies; recognise which scaling
    made them.
    """
    rope = RopeSpec(theta=theta, kind="llama3", factor=float(factors.max()), original_context=8192)
    plain, _ = RopeSpec(theta=theta).frequencies(head_dim)
    made, _ = rope.frequencies(head_dim)
    if factors.shape == plain.shape and np.allclose(plain / made, factors, rtol=1e-3):
        return rope
    raise ValueError(
        f"model={str(path)!r}: tensor {ROPE_FACTORS} is not the scaling of Llama 3; "
        "allowed: its factors for an original context of 8192, or no such tensor"
    )


def _check_types(path: Path, reader: GGUFReader) -> None:
    for kind in {tensor.tensor_type for tensor in reader.tensors}:
        try:
            block, block_bytes = GGML_QUANT_SIZES[kind]
            name = kind.name
            dtype = {"F32": np.float32, "F16": np.float16}.get(name)
            dequantize(np.zeros((1, block if dtype else block_bytes), dtype or np.uint8), kind)
        except NotImplementedError as error:
            raise ValueError(
                f"model={str(path)!r}: tensor type {kind.name} cannot be dequantised; "
                "allowed: F32, F16, BF16 and the quantisations that the gguf package reads"
            ) from error
