"""A safetensors file: a header in JSON that says where each tensor lies, then their bytes.

Slices are read into arrays of their own rather than mapped: pages of a mapped file count as memory
of the process until the system takes them back, and a file that shrinks meanwhile ends the process.
The layout and its rules are those of the safetensors format: offsets are in order, without overlap
and without holes.
"""

import json
import math
import os
import re
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pdjax.core.messages import shown

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Element types that can be read; a file may hold others."""

MAX_NAME = 300
MAX_HEADER_BYTES = 100_000_000
_POINTER = b"version https://git-lfs"
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
      dtype: the format's name of its element type.
      start, stop: offsets of its first byte and behind its last, in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """An open safetensors file.

    Attributes:
      tensors: what it holds, by name.

    Raises:
      ValueError: the file is missing, truncated, or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
            self._close = weakref.finalize(self, os.close, self._file)
            self.tensors = _header(self._file)
        except (OSError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: not a readable safetensors file ({reason})") from error

    def read(self, name: str, rows: slice, cols: slice) -> np.ndarray:
        """A fresh array with the slices `rows` and `cols`, of step 1, of a tensor: a vector has
        rows only, and the rows of several matrices are those of one after another.

        Raises:
          ValueError: the file has become shorter, or cannot be read.
        """
        tensor = self.tensors[name]
        dtype = DTYPES[tensor.dtype]
        size = math.prod(tensor.shape[:-1]) if len(tensor.shape) > 1 else tensor.shape[0]
        first, last, _ = rows.indices(size)
        last = max(first, last)
        if len(tensor.shape) == 1:
            return self._load(tensor.start + first * dtype.itemsize, (last - first,), dtype)
        width = tensor.shape[-1]
        left, right, _ = cols.indices(width)
        stride = width * dtype.itemsize
        if (left, right) == (0, width):
            return self._load(tensor.start + first * stride, (last - first, width), dtype)
        part = np.empty((last - first, max(right - left, 0)), dtype)
        step = max(1, _BLOCK_BYTES // max(stride, 1))
        for row in range(first, last, step):
            count = min(step, last - row)
            block = self._load(tensor.start + row * stride, (count, width), dtype)
            part[row - first : row - first + count] = block[:, left:right]
        return part

    def _load(self, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        values = np.empty(shape, dtype)
        rest = memoryview(values.reshape(-1).view(np.uint8))
        while rest:
            try:
                count = os.preadv(self._file, [rest], start)
            except OSError as error:
                raise ValueError(f"{self.path}: cannot be read ({error})") from error
            if count == 0:
                raise ValueError(f"{self.path}: ends at byte {start}, inside a tensor")
            rest, start = rest[count:], start + count
        return values


def _header(file: int) -> dict[str, StoredTensor]:
    size = os.fstat(file).st_size
    first = os.pread(file, len(_POINTER), 0)
    if first == _POINTER:
        raise ValueError("a Git LFS pointer stands in its place; fetch the file itself")
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"{size} bytes, and a header of {length}; it is truncated or another file")
    values = json.loads(os.pread(file, length, 8).decode("utf-8"))
    if not isinstance(values, dict):
        raise ValueError("its header is no object")
    values.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, 8 + length) for name, entry in values.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise ValueError(f"tensor {name} begins at byte {tensor.start}, not at {end}")
        end = tensor.stop
    if end != size:
        raise ValueError(f"{size} bytes, and tensors that end at byte {end}")
    return tensors


def _tensor(name: str, entry: Any, base: int) -> StoredTensor:
    if len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"tensor {shown(name)}: its name is no name")
    fields = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or not all(field in entry for field in fields):
        raise ValueError(f"tensor {name}: {shown(entry)}; allowed: {', '.join(fields)}")
    dtype, shape, offsets = (entry[field] for field in fields)
    if not isinstance(dtype, str) or not re.fullmatch(r"[A-Z0-9_]{1,20}", dtype):
        raise ValueError(f"tensor {name}: dtype={shown(dtype)}")
    if not _naturals(shape) or not _naturals(offsets):
        raise ValueError(f"tensor {name}: {shown(entry)} is malformed")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name}: data_offsets={shown(offsets)}")
    nbytes = offsets[1] - offsets[0]
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != nbytes:
        raise ValueError(
            f"tensor {name}: {nbytes} bytes of {dtype} do not fill shape {shown(shape)}"
        )
    return StoredTensor(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(type(value) is int and 0 <= value < 1 << 62 for value in values)
    )
