"""A Hugging Face directory: `config.json`, `*.safetensors` (one file, or several with an index),
`tokenizer.json`.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.api import (
    ALL,
    check_tensors,
    tensor_shapes,
    tensors,
    warn_if_endless,
)
from pdjax.device.checkpoints.hf_config import read_config, read_spec
from pdjax.device.checkpoints.hf_shards import locate_tensors
from pdjax.device.checkpoints.pieces import Pieces
from pdjax.device.checkpoints.safetensors_file import DTYPES, SafetensorsFile
from pdjax.device.models import family
from pdjax.text.tokenizer import NoTokenizer, Tokenizer
from pdjax.text.tokenizer_files import listed_end_token_ids

_LOG = logging.getLogger("pdjax")

EMBED, UNEMBED = family.EMBED.name, family.UNEMBED.name
_COMPARED_BYTES = 8 << 20


class HuggingFaceCheckpoint:
    """A directory with a model of a type that a family reads.

    Raises:
      ValueError: a file is missing or unreadable, the configuration asks for something unsupported,
        or a tensor has another shape or type than it must.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._spec = read_spec(directory)
        located = locate_tensors(directory, read_config(directory))
        pieces = _by_expert(self._spec, len(located))
        self._places = _canonical(self._spec, located, pieces)
        self._kept = {
            name: each
            for name, each in pieces.items()
            if name not in self._places and not self._places.keys().isdisjoint(each.shapes())
        }
        self._check()
        self._settle_head()
        self._tokenizer: Tokenizer | None = None
        try:
            self._tokenizer = Tokenizer.open(directory)
        except NoTokenizer as none:
            _LOG.warning("%s; prompts must be token ids, answers have no text", none)
            ends = listed_end_token_ids(directory)
        else:
            ends = self._tokenizer.eos_token_ids  # the files' ids, and those that texts give
        self._spec = replace(self._spec, eos_token_ids=ends)
        warn_if_endless(directory, self._spec)

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    def read(self, name: str, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        """See `Checkpoint.read`; in the element type of the file."""

        def of_file(name: str, rows: slice) -> np.ndarray:
            file, stored = self._places[name]
            return file.read(stored, rows, cols)

        pieces = self._kept.get(name)
        return of_file(name, rows) if pieces is None else pieces.read(rows, of_file)

    def _check(self) -> None:
        """Hold the tensors against the configuration, a head that a tied model carries too."""
        shapes = {name: file.tensors[stored].shape for name, (file, stored) in self._places.items()}
        untied = replace(self._spec, tied=False)
        carries = self._spec.tied and UNEMBED in shapes
        # Old files carry the table of frequencies.
        ignored = {name for name in shapes if name.endswith("rotary_emb.inv_freq")}
        if carries and EMBED not in shapes:  # of a tied pair transformers takes the one it finds
            self._places[EMBED] = self._places[UNEMBED]
            shapes[EMBED] = shapes[UNEMBED]
        spec = untied if carries else self._spec
        check_tensors(self._directory, spec, shapes, ignored, self._kept)
        for name, (file, stored) in self._places.items():
            dtype = file.tensors[stored].dtype
            if name not in ignored and dtype not in DTYPES:
                raise ValueError(
                    f"model={str(self._directory)!r}: tensor {name} is {dtype}; "
                    f"allowed: {', '.join(DTYPES)}"
                )

    def _settle_head(self) -> None:
        """Of a tied model whose file holds an output matrix that is not the embedding, the matrix
        counts, as in transformers 5.24.
        """
        if not self._spec.tied or UNEMBED not in self._places:
            return
        if self._places[UNEMBED] == self._places[EMBED] or self._same_tensor(EMBED, UNEMBED):
            return
        self._spec = replace(self._spec, tied=False)
        _LOG.warning(
            "%s: tie_word_embeddings=true, but lm_head.weight is not the embedding; "
            "lm_head.weight is used",
            self._directory,
        )

    def _same_tensor(self, one: str, other: str) -> bool:
        """Whether two matrices hold the same numbers; reads a few megabytes at a time."""
        rows = self._spec.vocab_size
        step = max(1, _COMPARED_BYTES // (8 * self._spec.model_dim))
        for row in range(0, rows, step):
            block = slice(row, min(row + step, rows))
            if not np.array_equal(self.read(one, block), self.read(other, block)):
                return False
        return True


def _canonical(
    spec: ModelSpec, located: dict[str, SafetensorsFile], pieces: Mapping[str, Pieces]
) -> dict[str, tuple[SafetensorsFile, str]]:
    """The file and the name there of each tensor, by its canonical name.

    As in transformers a name may be one of transformers 4, and may lack the prefix `model.` or have
    it once too often.
    """
    expected = set(tensor_shapes(spec)) | {UNEMBED}
    names = {name: name for name in expected}
    for name, _, tensor in tensors(spec):
        if tensor.old:
            names[name.removesuffix(tensor.name) + tensor.old] = name
    names |= {name: name for each in pieces.values() for name in each.shapes()}
    places: dict[str, tuple[SafetensorsFile, str]] = {}
    # The canonical name comes first, so that another spelling of it does not take its place.
    for stored in sorted(located, key=lambda name: name not in expected):
        name = next((names[n] for n in _spellings(stored) if n in names), stored)
        places.setdefault(name, (located[stored], stored))
    return places


def _by_expert(spec: ModelSpec, stored: int) -> dict[str, Pieces]:
    """The tensors of all experts, by their names, as files keep them that have one of each expert;
    none where `stored` tensors are too few for that, however many a configuration promises."""
    told = [(name, tensor) for name, _, tensor in tensors(spec) if tensor.of_expert]
    if sum(tensor.stored_shape(spec)[0] for _, tensor in told) > stored:
        return {}
    return {
        name: Pieces.by_expert(tensor, spec, name.removesuffix(tensor.name))
        for name, tensor in told
    }


def _spellings(stored: str) -> Iterable[str]:
    return stored, f"model.{stored}", stored.removeprefix("model.")
