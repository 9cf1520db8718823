"""A Hugging Face directory: `config.json`, `*.safetensors` (one file, or several with an index),
`tokenizer.json`.

safetensors maps its files, so a slice costs what it holds.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pdjax.device.model.checkpoints.api import ALL, UNEMBED, check_tensors
from pdjax.device.model.checkpoints.hf_config import read_spec
from pdjax.json_file import read_json
from pdjax.model_spec import ModelSpec
from pdjax.tokenizer import TOKENIZER_FILE, Tokenizer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LOG = logging.getLogger("pdjax")

DTYPES = ("F64", "F32", "F16", "BF16")


class HuggingFaceCheckpoint:
    """A directory with a model of type "llama", "mistral" or "qwen2".

    Raises:
      ValueError: a file is missing or unreadable, the configuration asks for something unsupported,
        or a tensor has another shape or type than it must.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._spec = read_spec(directory)
        self._file_of: dict[str, Any] = {}
        for path in _weight_files(directory):
            file = _open(path)
            self._file_of.update(dict.fromkeys(file.keys(), file))
        shapes = {}
        for name, file in self._file_of.items():
            tensor = file.get_slice(name)
            shapes[name] = tuple(tensor.get_shape())
            if tensor.get_dtype() not in DTYPES:
                raise ValueError(
                    f"model={str(directory)!r}: tensor {name} is {tensor.get_dtype()}; "
                    f"allowed: {', '.join(DTYPES)}"
                )
        # Old files carry the table of frequencies; a tied model may carry its embedding twice.
        ignored = {name for name in shapes if name.endswith("rotary_emb.inv_freq")}
        check_tensors(
            directory, self._spec, shapes, ignored | ({UNEMBED} if self._spec.tied else set())
        )
        self._tokenizer: Tokenizer | None = None
        if (directory / TOKENIZER_FILE).is_file():
            self._tokenizer = Tokenizer.open(directory)
            ends = self._tokenizer.eos_token_ids  # the files' ids, and those that texts give
            self._spec = replace(self._spec, eos_token_ids=ends)
        else:
            _LOG.warning(
                "%s: %s is missing; prompts must be token ids, answers have no text",
                directory,
                TOKENIZER_FILE,
            )

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    def read(self, name: str, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        """See `Checkpoint.read`; in the element type of the file."""
        tensor = self._file_of[name].get_slice(name)
        return tensor[rows, cols] if len(tensor.get_shape()) == 2 else tensor[rows]


def _weight_files(directory: Path) -> list[Path]:
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if not (directory / INDEX_FILE).is_file():
        raise ValueError(f"model={str(directory)!r}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ValueError(
            f"{directory / INDEX_FILE}: weight_map={weight_map!r}; "
            "allowed: tensor names to file names"
        )
    return [directory / name for name in sorted(set(weight_map.values()))]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
