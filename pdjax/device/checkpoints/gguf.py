"""GGUF: metadata, tokenizer and (usually quantised) tensors in one file or the shards of a split,
as llama.cpp writes them.

Tensors are dequantised to float32, only the rows and blocks asked for. For architecture "llama",
llama.cpp stores the rows of the Q and K projections and of their biases so that the two dimensions
that RoPE rotates together are neighbours; the reader puts them back, half a head apart, which is
the convention of Hugging Face and of this project.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from pdjax.core.model_spec import ModelSpec, RopeSpec
from pdjax.device.checkpoints.api import ALL, check_tensors, tensors
from pdjax.device.checkpoints.gguf_keys import ArchKeys, check_keys
from pdjax.device.checkpoints.gguf_rope import (
    LONG_FACTORS,
    ROPE_FACTORS,
    longrope_spec,
    rope_spec,
)
from pdjax.device.checkpoints.pieces import Pieces
from pdjax.device.models.family import EMBED, UNEMBED, ModelFamily
from pdjax.device.models.registry import FAMILIES
from pdjax.formats.gguf_file import GGUFFile, TensorEntry
from pdjax.formats.gguf_metadata import Metadata
from pdjax.formats.gguf_splits import open_shards
from pdjax.text.gguf_end_tokens import eos_token_ids
from pdjax.text.tokenizer import Tokenizer

__all__ = ["ROPE_FACTORS", "GGUFCheckpoint"]

MAX_CONTEXT = 2**31 - 1
"""Positions are i32."""

_LOG = logging.getLogger("pdjax")
_NO_VOCABULARY = ("none", "no_vocab")
"""Values of `tokenizer.ggml.model`, the first of which stands for none."""

_CHUNK = 1 << 22
"""Elements read at a time."""

_AT_ONCE = 1 << 17
"""Elements dequantised at a time: the gguf package goes over them several times, and they stay in a
core's cache meanwhile."""


class GGUFCheckpoint:
    """A GGUF model of an architecture that a family reads: a file, or the first shard of a split.

    Logs a warning where neither the metadata nor the vocabulary say what ends a text.

    Raises:
      ValueError: a file is unreadable or missing, of another architecture, or uses a feature or a
        quantisation that is not supported.
    """

    def __init__(self, path: Path) -> None:
        shards = open_shards(path)
        self._meta = Metadata(path, shards[0])
        self._tensors: dict[str, tuple[GGUFFile, TensorEntry]] = {
            name: (shard, entry) for shard in shards for name, entry in shard.tensors.items()
        }
        shapes = {name: entry.shape for name, (_, entry) in self._tensors.items()}
        self._spec = self._read_spec(path, shapes)
        known = list(tensors(self._spec))
        self._kept = {
            name: Pieces.by_part(tensor, self._spec, gguf.removesuffix(tensor.gguf))
            for name, gguf, tensor in known
            if tensor.gguf_parts
        }
        names = {gguf: name for name, gguf, tensor in known if tensor.gguf}
        self._tensors = {names.get(name, name): found for name, found in self._tensors.items()}
        self._interleaved = {name for name, _, tensor in known if tensor.interleaved}
        self._less_one = {name for name, _, tensor in known if tensor.less_one}
        shapes = {name: entry.shape for name, (_, entry) in self._tensors.items()}
        check_tensors(path, self._spec, shapes, (ROPE_FACTORS, *LONG_FACTORS), self._kept)
        _check_types(path, {entry.kind for _, entry in self._tensors.values()})
        if not self._spec.eos_token_ids:
            _LOG.warning(
                "model=%r: no token is named as the end of a text; requests end at max_tokens or "
                "at a stop string",
                str(path),
            )

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def tokenizer(self) -> Tokenizer | None:
        if self._meta.text("tokenizer.ggml.model", "none") in _NO_VOCABULARY:
            _LOG.warning(
                "model=%r: the file holds no vocabulary; prompts must be token ids",
                str(self._meta.path),
            )
            return None
        return Tokenizer.from_gguf(self._meta)

    def read(self, name: str, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        """See `Checkpoint.read`; always float32."""
        pieces = self._kept.get(name)
        if pieces is not None:
            return pieces.read(rows, lambda part, its_rows: self.read(part, its_rows, cols))
        file, entry = self._tensors[name]
        stored_rows = self._rows(name, rows, entry)
        if len(entry.shape) == 1:
            values = _dequantised(file.data(entry.name), entry.kind)[stored_rows].copy()
            return values - 1 if name in self._less_one else values
        block, block_bytes = GGML_QUANT_SIZES[entry.kind]
        first, last, _ = cols.indices(entry.shape[-1])
        blocks = slice(first // block, -(-last // block))
        matrix = file.data(entry.name).reshape(prod(entry.shape[:-1]), -1)
        offset = first - blocks.start * block
        order = np.arange(len(matrix))[stored_rows]
        out = np.empty((len(order), max(last - first, 0)), np.float32)
        if not out.size:
            return out
        step = max(_CHUNK // ((blocks.stop - blocks.start) * block), 1)
        for start in range(0, len(order), step):
            part = order[start : start + step]
            span: slice | np.ndarray = part
            if part[-1] - part[0] == len(part) - 1 and np.all(np.diff(part) == 1):
                span = slice(part[0], part[-1] + 1)
            stored = matrix[span, blocks.start * block_bytes : blocks.stop * block_bytes]
            values = _dequantised(np.ascontiguousarray(stored), entry.kind)
            out[start : start + step] = values[:, offset : offset + last - first]
            file.let_go()
        return out

    def _rows(self, name: str, rows: slice, entry: TensorEntry) -> slice | np.ndarray:
        if name not in self._interleaved:
            return rows
        # Stored row (head, pair i, half j) holds row (head, j, i) of the projection.
        stored = np.arange(entry.shape[0]).reshape(-1, self._spec.head_dim // 2, 2)
        return stored.swapaxes(1, 2).reshape(-1)[rows]

    def _read_spec(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
        meta = self._meta
        family = _family(meta)
        arch = str(family.gguf)
        heads = meta.integer(f"{arch}.attention.head_count")
        width = meta.integer(f"{arch}.embedding_length")
        head_dim = meta.integer(f"{arch}.attention.key_length", width // max(heads, 1))
        context = meta.integer(f"{arch}.context_length")
        _check_values(meta, arch, head_dim, context, len(shapes), family.gguf_keys)
        check_keys(meta, arch, head_dim, width, family.gguf_keys)
        if len(shapes.get(EMBED.gguf, ())) != 2:
            raise ValueError(f"model={str(path)!r}: tensor {EMBED.gguf} is missing")
        vocab_size = shapes[EMBED.gguf][0]
        _check_vocabulary(meta, arch, vocab_size)
        try:
            dense = ModelSpec(
                vocab_size=vocab_size,
                num_layers=meta.integer(f"{arch}.block_count"),
                model_dim=width,
                mlp_dim=meta.integer(f"{arch}.feed_forward_length"),
                query_heads=heads,
                kv_heads=meta.integer(f"{arch}.attention.head_count_kv", heads),
                head_dim=head_dim,
                context=context,
                rope=self._rope(arch, head_dim, context),
                norm_eps=_epsilon(meta, arch),
                tied=UNEMBED.gguf not in shapes,
                qkv_bias="blk.0.attn_q.bias" in shapes,
                eos_token_ids=eos_token_ids(meta),
                family=family.name,
            )
            return family.gguf_spec(dense, ArchKeys(meta, arch, head_dim))
        except ValueError as error:
            if str(error).startswith("model="):
                raise
            raise ValueError(f"model={str(path)!r}: {error}") from error

    def _rope(self, arch: str, head_dim: int, context: int) -> RopeSpec:
        dims = self._meta.integer(f"{arch}.rope.dimension_count", head_dim)
        if not 2 <= dims <= head_dim:
            raise self._meta.refuse(f"{arch}.rope.dimension_count", f"2 to {head_dim}", dims)
        long, short = (self._rope_factors(name, dims) for name in LONG_FACTORS)
        factors = self._rope_factors(ROPE_FACTORS, dims)
        if long is not None and short is not None:
            rope = longrope_spec(self._meta, arch, context, long, short)
        else:
            rope = rope_spec(self._meta, arch, dims, context, factors)
        return replace(rope, rotary_dim=None if dims == head_dim else dims)

    def _rope_factors(self, name: str, dims: int) -> np.ndarray | None:
        if name not in self._tensors:
            return None
        file, entry = self._tensors[name]
        if entry.kind.name != "F32" or entry.shape != (dims // 2,):
            raise ValueError(
                f"model={str(file.path)!r}: tensor {name} is {entry.kind.name} of shape "
                f"{entry.shape}; allowed: F32 of shape {(dims // 2,)}"
            )
        return file.data(name).view(np.float32).astype(np.float64)


def _family(meta: Metadata) -> ModelFamily:
    """The one that reads files of this architecture."""
    kind = meta.text("general.type", "model")
    if kind != "model":
        raise meta.refuse("general.type", "'model'", kind)
    arch = meta.text("general.architecture")
    read = [family for family in FAMILIES.values() if family.gguf is not None]
    named = [family for family in read if family.gguf == arch]
    if not named:
        known = dict.fromkeys(str(family.gguf) for family in read)
        raise meta.refuse("general.architecture", ", ".join(known), arch)
    experts = meta.integer(f"{arch}.expert_count", 0) > 0
    return next((family for family in named if family.experts == experts), named[0])


def _check_values(
    meta: Metadata, arch: str, head_dim: int, context: int, tensors: int, honoured: Collection[str]
) -> None:
    if not 1 <= context <= MAX_CONTEXT:
        raise meta.refuse(f"{arch}.context_length", f"1 to {MAX_CONTEXT}", context)
    layers = meta.integer(f"{arch}.block_count")
    if not 1 <= layers <= tensors:
        raise meta.refuse(f"{arch}.block_count", f"1 to {tensors}, the number of tensors", layers)
    if not 2 <= head_dim <= 1 << 16:
        raise meta.refuse(f"{arch}.attention.key_length", "2 to 65536", head_dim)
    same: dict[str, str] = {
        "attention.value_length": "the key length",
        "rope.dimension_count": "the head dimension",
    }
    for key, why in same.items():
        if key in honoured:
            continue
        found = meta.integer(f"{arch}.{key}", head_dim)
        if found != head_dim:
            raise meta.refuse(f"{arch}.{key}", f"{head_dim} ({why})", found)
    window = meta.integer(f"{arch}.attention.sliding_window", 0)
    if "attention.sliding_window" not in honoured and window and not window >= context:
        raise meta.refuse(
            f"{arch}.attention.sliding_window",
            f"none, or at least the context of {context}",
            window,
        )


def _check_vocabulary(meta: Metadata, arch: str, vocab_size: int) -> None:
    """Hold the vocabulary against the rows of the embedding: a token without a row has no meaning.
    Rows without a token are padding.
    """
    said = meta.integer(f"{arch}.vocab_size", vocab_size)
    if said != vocab_size:
        raise meta.refuse(f"{arch}.vocab_size", f"{vocab_size}, the rows of token_embd", said)
    tokens = meta.length("tokenizer.ggml.tokens")
    if tokens > vocab_size:
        raise ValueError(
            f"model={str(meta.path)!r}: tokenizer.ggml.tokens holds {tokens} tokens; allowed: at "
            f"most {vocab_size}, the rows of token_embd"
        )
    for index in eos_token_ids(meta):
        if index >= vocab_size:
            raise ValueError(
                f"model={str(meta.path)!r}: token {index} is named as the end of a text; allowed: "
                f"0 to {vocab_size - 1}"
            )


def _epsilon(meta: Metadata, arch: str) -> float:
    key = f"{arch}.attention.layer_norm_rms_epsilon"
    epsilon = meta.number(key)
    if epsilon < 0:
        raise meta.refuse(key, "0 or more", epsilon)
    return epsilon


def _dequantised(stored: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Values f32[..., n] of bytes u8[..., m]."""
    if kind.name in ("F32", "F16"):
        return stored.view(np.float32 if kind.name == "F32" else np.float16).astype(np.float32)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks, step = stored.reshape(-1, block_bytes), max(_AT_ONCE // block, 1)
    values = np.empty((len(blocks), block), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # weights that are not finite stay so
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step]
            # As one row: the package would take rows apart, a few at a time.
            values[start : start + step] = dequantize(part.reshape(1, -1), kind).reshape(-1, block)
    return values.reshape(*stored.shape[:-1], -1)


def _check_types(path: Path, kinds: set[GGMLQuantizationType]) -> None:
    for kind in kinds:
        try:
            _dequantised(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise ValueError(
                f"model={str(path)!r}: tensor type {kind.name} cannot be dequantised; "
                "allowed: F32, F16, BF16 and the quantisations that the gguf package reads"
            ) from error
