"""What every checkpoint gives, whatever its format: an architecture, a tokenizer, and slices of
named tensors.

The names and the orientation are those of Hugging Face: `model.layers.3.mlp.up_proj.weight` is
[out, in]. A format's reader translates to them once, so that `weights.py` knows one vocabulary
only, and reads no more than it is asked for.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from pdjax.core.messages import shown
from pdjax.core.model_spec import ModelSpec
from pdjax.text.tokenizer import Tokenizer

_LOG = logging.getLogger("pdjax")

ALL = slice(None)

EMBED = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
UNEMBED = "lm_head.weight"


class Checkpoint(Protocol):
    """A model on disk."""

    @property
    def spec(self) -> ModelSpec:
        """Architecture of the model."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that came with the model, or None: then prompts must be token ids."""
        ...

    def read(self, name: str, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        """A fresh array with rows `rows` and columns `cols` of tensor `name`; a vector has rows
        only.

        Slices have step 1. The element type is a float type of the reader's choice.
        """
        ...


def layer_tensor(layer: int, part: str) -> str:
    """Name of the tensor `part` (such as "mlp.up_proj.weight") of layer `layer`."""
    return f"model.layers.{layer}.{part}"


def layer_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes, [out, in], of the tensors of one layer, by part."""
    d, f, h = spec.model_dim, spec.mlp_dim, spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (spec.query_heads * h, d),
        "self_attn.k_proj.weight": (spec.kv_heads * h, d),
        "self_attn.v_proj.weight": (spec.kv_heads * h, d),
        "self_attn.o_proj.weight": (d, spec.query_heads * h),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
    }
    if spec.qkv_bias:
        shapes["self_attn.q_proj.bias"] = (spec.query_heads * h,)
        shapes["self_attn.k_proj.bias"] = (spec.kv_heads * h,)
        shapes["self_attn.v_proj.bias"] = (spec.kv_heads * h,)
    return shapes


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes, [out, in], of every tensor of a model, by name."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBED: (spec.vocab_size, spec.model_dim),
        FINAL_NORM: (spec.model_dim,),
    }
    if not spec.tied:
        shapes[UNEMBED] = (spec.vocab_size, spec.model_dim)
    of_layer = layer_shapes(spec)
    for layer in range(spec.num_layers):
        shapes.update({layer_tensor(layer, part): shape for part, shape in of_layer.items()})
    return shapes


def check_tensors(
    source: Path, spec: ModelSpec, found: Mapping[str, tuple[int, ...]], ignored: Iterable[str] = ()
) -> None:
    """Hold the tensors of a file against those that its configuration promises.

    A tensor that the architecture does not have is refused too: a model computed without it is
    another model.

    Raises:
      ValueError: naming the tensor, the shape found and the shape expected.
    """
    expected = tensor_shapes(spec)
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(
                f"model={str(source)!r}: tensor {name} is missing; expected shape {shape}"
            )
        if tuple(found[name]) != shape:
            raise ValueError(
                f"model={str(source)!r}: tensor {name} has shape {tuple(found[name])}; "
                f"the model's configuration makes it {shape}"
            )
    unknown = sorted(set(found) - set(expected) - set(ignored))
    if unknown:
        name = shown(unknown[0])
        raise ValueError(
            f"model={str(source)!r}: tensor {name} (one of {len(unknown)} such) has no place in "
            "the architecture that the configuration describes; allowed are the tensors "
            "of a Llama-like decoder"
        )


def warn_if_endless(source: Path, spec: ModelSpec) -> None:
    """Warn of a model without any end token in its vocabulary: each of its answers has `max_tokens`
    tokens."""
    if not any(index < spec.vocab_size for index in spec.eos_token_ids):
        _LOG.warning(
            "model=%r: names no end token (eos_token_id) below vocab_size=%d; answers end at "
            "max_tokens or at a stop string",
            str(source),
            spec.vocab_size,
        )
