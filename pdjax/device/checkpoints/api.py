"""What every checkpoint gives, whatever its format: an architecture, a tokenizer, and slices of
named tensors.

The names and the orientation are those of Hugging Face: `model.layers.3.mlp.up_proj.weight` is
[out, in]. A format's reader translates to them once, so that `weights.py` knows one vocabulary
only, and reads no more than it is asked for. Which tensors a model has, its family says.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from pdjax.core.messages import shown
from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.pieces import Pieces
from pdjax.device.models.family import Tensor, Weight
from pdjax.device.models.registry import family_of
from pdjax.text.tokenizer import Tokenizer

_LOG = logging.getLogger("pdjax")

ALL = slice(None)


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
        only, and the rows of a tensor of several matrices are those of one after another.

        Slices have step 1. The element type is a float type of the reader's choice.
        """
        ...


def layer_tensor(layer: int, part: str) -> str:
    """Name of the tensor `part` (such as "mlp.up_proj.weight") of layer `layer`."""
    return f"model.layers.{layer}.{part}"


def tensors(spec: ModelSpec) -> Iterator[tuple[str, str, Tensor]]:
    """Every tensor of a model: its name, its name in GGUF files, and what its family says of it.

    A tensor's own names are the ends of both, so that what comes before is found.
    """
    family = family_of(spec)
    for tensor in _sources(family.outside(spec)):
        yield tensor.name, tensor.gguf, tensor
    kinds = family.kinds(spec)
    of_kind = {kind: _sources(family.weights(spec, kind)) for kind in dict.fromkeys(kinds)}
    for layer, kind in enumerate(kinds):
        for tensor in of_kind[kind]:
            yield layer_tensor(layer, tensor.name), f"blk.{layer}.{tensor.gguf}", tensor


def _sources(weights: Sequence[Weight]) -> list[Tensor]:
    """The tensors that weights are made of, each once."""
    norms = [weight.norm for weight in weights if weight.norm is not None]
    return list(dict.fromkeys([*norms, *(tensor for each in weights for tensor in each.tensors)]))


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes, [out, in] or, of experts, [expert, out, in], of every tensor of a model, by name."""
    return {name: tensor.stored_shape(spec) for name, _, tensor in tensors(spec)}


def num_params(spec: ModelSpec) -> int:
    """Weights of the model; the tied embedding counts once."""
    return sum(prod(shape) for shape in tensor_shapes(spec).values())


def check_tensors(
    source: str | Path,
    spec: ModelSpec,
    found: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
    kept: Mapping[str, Pieces] | None = None,
) -> None:
    """Hold the tensors of a file against those that its configuration promises; `kept` names the
    ones that the file keeps in pieces.

    A tensor that the architecture does not have is refused too: a model computed without it is
    another model.

    Raises:
      ValueError: naming the tensor, the shape found and the shape expected.
    """
    expected = tensor_shapes(spec)
    for name, pieces in (kept or {}).items():
        del expected[name]
        expected |= pieces.shapes()
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
            f"the architecture that the configuration describes; allowed are the tensors of "
            f"the family {spec.family}"
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
