"""The project's own format, written by `pdjax convert`: an orbax checkpoint with the architecture
and tokenizer beside.

    DIRECTORY/model_spec.json   ModelSpec
              weights/          orbax PyTree checkpoints: outside, layer_0, layer_1, ...; leaf:
              tensor, by its name tokenizer.json, tokenizer_config.json, generation_config.json

Tensors are stored in the target element type and in chunks, so that a later start neither
dequantises nor reads more than its shards. Orbax writes; slices are read with tensorstore, the
array store beneath orbax, because orbax restores whole arrays or whole shards of them.
"""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore
from tqdm import tqdm

from pdjax.core.messages import shown
from pdjax.core.model_spec import ModelSpec, RopeSpec
from pdjax.device.checkpoints.api import (
    ALL,
    Checkpoint,
    check_tensors,
    tensor_shapes,
    warn_if_endless,
)
from pdjax.device.checkpoints.pieces import runs
from pdjax.device.models.registry import family_named
from pdjax.formats.json_file import read_json
from pdjax.text.tokenizer import Tokenizer

SPEC_FILE = "model_spec.json"
WEIGHTS_FOLDER = "weights"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
CHUNK_BYTES = 4 << 20


class OrbaxCheckpoint:
    """A directory written by `convert`.

    Raises:
      ValueError: a file is missing, unreadable, or does not match the architecture.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._spec = _read_spec(directory / SPEC_FILE)
        weights = (directory / WEIGHTS_FOLDER).resolve()
        if not weights.is_dir():
            raise ValueError(f"model={str(directory)!r}: {WEIGHTS_FOLDER}/ is missing")
        context = tensorstore.Context()  # shared, so that the database of chunks is opened once
        names = list(tensor_shapes(self._spec))
        for name in names:  # before any is opened: a spec may promise thousands
            if not (weights / _group(name)).is_dir():
                raise ValueError(
                    f"model={str(directory)!r}: tensor {name} cannot be read "
                    f"({WEIGHTS_FOLDER}/{_group(name)}/ is missing)"
                )
        opening = {name: _open(weights, name, context) for name in names}
        self._stores = {}
        for name, store in opening.items():
            with self._named(name):
                self._stores[name] = store.result()
            dtype = self._stores[name].dtype.name
            if dtype not in DTYPES:
                raise ValueError(
                    f"model={str(directory)!r}: tensor {name} is {dtype}; "
                    f"allowed: {', '.join(DTYPES)}"
                )
        check_tensors(
            directory,
            self._spec,
            {name: tuple(store.shape) for name, store in self._stores.items()},
        )
        warn_if_endless(directory, self._spec)

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.open_if_any(self._directory)

    def read(self, name: str, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        """See `Checkpoint.read`; in the element type that `convert` wrote."""
        store = self._stores[name]
        with self._named(name):
            if store.rank < 3:
                return (store[rows, cols] if store.rank == 2 else store[rows]).read().result()
            matrices, each, _ = store.shape
            parts = [store[i, part, cols].read() for i, part in runs(rows, each, matrices)]
            return np.concatenate([part.result() for part in parts])

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Say which tensor it was that tensorstore could not read."""
        try:
            yield
        except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split("[")[0].split())
            raise ValueError(
                f"model={str(self._directory)!r}: tensor {name} cannot be read ({reason[:300]})"
            ) from error


def convert(checkpoint: Checkpoint, directory: Path, dtype: str) -> None:
    """Write `checkpoint` to `directory` as an orbax checkpoint of element type `dtype`.

    The directory appears whole or not at all. Host memory holds one layer at a time.

    Raises:
      ValueError: `dtype` is not allowed, or `directory` exists.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: allowed: {', '.join(DTYPES)}")
    if directory.exists():
        raise ValueError(f"output={str(directory)!r}: exists already; name a new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        text = json.dumps(dataclasses.asdict(checkpoint.spec), indent=2)
        (scratch / SPEC_FILE).write_text(text + "\n")
        tokenizer = checkpoint.tokenizer()
        if tokenizer is not None:
            tokenizer.save(scratch)
        _write(checkpoint, (scratch / WEIGHTS_FOLDER).resolve(), DTYPES[dtype])
        scratch.chmod(0o755)  # mkdtemp makes private directories
        os.replace(scratch, directory)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _write(checkpoint: Checkpoint, weights: Path, dtype: np.dtype) -> None:
    import orbax.checkpoint as ocp  # takes most of a second, and only this function needs it

    groups: dict[str, list[str]] = {}
    shapes = tensor_shapes(checkpoint.spec)
    for name in shapes:
        groups.setdefault(_group(name), []).append(name)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
        for group, names in tqdm(
            groups.items(), desc="converting", unit="layer", delay=2, disable=None
        ):
            tree = {
                name: np.ascontiguousarray(checkpoint.read(name), dtype).reshape(shapes[name])
                for name in names
            }
            chunks = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in names}
            checkpointer.save(weights / group, args=ocp.args.PyTreeSave(tree, chunks))


def _group(name: str) -> str:
    """Which orbax checkpoint holds a tensor."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return f"layer_{match[1]}" if match else "outside"


def _open(weights: Path, name: str, context: tensorstore.Context) -> Any:
    store = {"driver": "ocdbt", "base": f"file://{weights / _group(name)}", "path": name}
    return tensorstore.open(
        {"driver": "zarr3", "kvstore": store}, open=True, read=True, context=context
    )


def _read_spec(path: Path) -> ModelSpec:
    values = read_json(path)
    try:  # models that were converted before there were families are Llama's, or almost
        kind = family_named(values.get("family", "llama")).spec_type
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values.get("rope"), dict):
        raise ValueError(f"{path}: rope={shown(values.get('rope'))}; allowed: an object")
    if not isinstance(values.get("eos_token_ids"), list):
        found = shown(values.get("eos_token_ids"))
        raise ValueError(f"{path}: eos_token_ids={found}; allowed: a list of token ids")
    try:
        return kind(**_typed(path, kind, values))
    except TypeError as error:  # a field is missing
        raise ValueError(
            f"{path}: not the architecture that this version of pdjax writes ({error})"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _typed(path: Path, record: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a spec, of which JSON keeps a RopeSpec as an object and a tuple as a list."""
    fields = {field.name: field for field in dataclasses.fields(record)}
    unknown = set(found) - set(fields)
    if unknown:
        raise ValueError(
            f"{path}: not the architecture that this version of pdjax writes "
            f"(unknown field {shown(min(unknown))})"
        )

    def typed(name: str, value: Any) -> Any:
        if isinstance(value, dict) and fields[name].default_factory is RopeSpec:
            return RopeSpec(**_typed(path, RopeSpec, value))
        tuples = isinstance(value, list) and isinstance(fields[name].default, tuple)
        return tuple(value) if tuples else value

    return {name: typed(name, value) for name, value in found.items()}
