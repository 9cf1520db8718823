"""Reads a GGUF file: header, metadata, an index of tensors, and their bytes.

The file is memory-mapped: opening it reads the header, metadata and index; `GGUFFile.data` maps the
bytes of a tensor. The reader compares every count, length and offset with the size of the file
before it allocates that much, so a damaged file is refused and costs no memory.

The layout is that of the GGUF specification of ggml, versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from pdjax.core.messages import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_STRINGS = 1 << 21
"""Most strings of one metadata array: the largest vocabularies hold a sixth of it."""

MAX_NAME = 512
"""Most characters of a key or of a tensor's name."""

_ALIGNMENT = 32
_MAX_DIMS = 4
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
"""Element type of metadata values for each of GGUF's type numbers; a bool is a byte."""

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class TensorEntry:
    """The index entry of one tensor.

    Attributes:
      kind: how the elements are stored.
      shape: lengths of the axes, the slowest first, in numpy's order.
      start: offset of the first byte in the file.
      nbytes: size in bytes.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GGUFFile:
    """A GGUF file, opened.

    Attributes:
      path: the file.
      fields: metadata by key: a number, a bool, `bytes` of a string, an array of numbers or bools
        (numpy, mapped), or a list of `bytes`.
      tensors: the index by name, in the order of the tensors' bytes in the file.

    Raises:
      ValueError: the file is missing, no GGUF file, of another version or byte order, truncated, or
        contradicts itself; the message names the key or tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ValueError(f"model={str(path)!r}: no such file")
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, TensorEntry] = {}
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read()
        except (OSError, ValueError) as error:  # mmap raises ValueError for an empty file
            reason = " ".join(str(error).split())
            raise ValueError(f"model={str(path)!r}: not a readable GGUF file ({reason})") from error

    def data(self, name: str) -> np.ndarray:
        """Return the stored bytes of tensor `name`, u8[nbytes], mapped."""
        entry = self.tensors[name]
        return np.frombuffer(self._bytes, np.uint8, entry.nbytes, entry.start)

    def let_go(self) -> None:
        """Unmap the pages of the file that were read; a later read maps them again.

        A mapped page counts as memory of the process, even one that the system could drop.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            self._bytes.madvise(mmap.MADV_DONTNEED)

    def _read(self) -> None:
        cursor = _Cursor(self._bytes)
        tensor_count, field_count = _header(cursor)
        for at in range(field_count):
            key = cursor.name(f"metadata key {at}")
            if key in self.fields:
                raise ValueError(f"metadata key {key!r} occurs twice")
            self.fields[key] = cursor.value(key)
        entries = [_entry(cursor, at) for at in range(tensor_count)]
        alignment = self._alignment()
        start = -(-cursor.at // alignment) * alignment
        for entry in _placed(entries, start, alignment, len(self._bytes)):
            if entry.name in self.tensors:
                raise ValueError(f"tensor {entry.name!r} occurs twice")
            self.tensors[entry.name] = entry

    def _alignment(self) -> int:
        value = self.fields.get("general.alignment", _ALIGNMENT)
        if type(value) is not int or not 0 < value <= 1 << 30 or value & (value - 1):
            raise ValueError(f"general.alignment={shown(value)}; allowed: a power of two")
        return value


def starts_like_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins with GGUF's magic number; its name does not matter."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class _Cursor:
    """Reads one value after another; a value that ends beyond the file is a ValueError."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._buffer = buffer
        self._size = len(buffer)
        self.at = 0

    def take(self, nbytes: int, what: str) -> int:
        """Return the offset of the next `nbytes` and move past them."""
        start = self.at
        if nbytes > self._size - start:
            raise ValueError(
                f"{what} needs {nbytes} bytes at offset {start}; the file has {self._size}"
            )
        self.at = start + nbytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self._buffer, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self._buffer, self.take(8, what))[0])

    def count(self, what: str, least: int) -> int:
        """Read a number of items; the rest of the file must hold `least` bytes for each."""
        number = self.u64(what)
        if number * least > self._size - self.at:
            raise ValueError(f"{what} is {number}; the file has {self._size} bytes")
        return number

    def string(self, what: str) -> bytes:
        start = self.take(self.u64(f"length of {what}"), what)
        return self._buffer[start : self.at]

    def name(self, what: str) -> str:
        """Read a key or a tensor's name; it must be short and printable, since messages show it."""
        raw = self.string(what)
        try:
            found = raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{what}: {raw[:40]!r} is not UTF-8") from None
        if len(found) > MAX_NAME or not found.isprintable():
            raise ValueError(
                f"{what}: {found[:40]!r}, {len(found)} characters; allowed: at most {MAX_NAME} "
                "printable ones"
            )
        return found

    def value(self, key: str) -> Any:
        kind = self.u32(f"type of {key}")
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self._array(key)
        return self._numbers(key, kind, 1)[0].item()

    def _array(self, key: str) -> Any:
        kind = self.u32(f"type of the elements of {key}")
        if kind == _STRING:
            return self._strings(key)
        if kind not in _NUMBERS:
            what = "arrays" if kind == _ARRAY else f"type {kind}"
            raise ValueError(f"{key} is an array of {what}; allowed: numbers, bools or strings")
        return self._numbers(key, kind, self.count(f"length of {key}", _NUMBERS[kind].itemsize))

    def _numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        if kind not in _NUMBERS:
            raise ValueError(f"{key} has type {kind}; allowed: 0 to 12")
        dtype = _NUMBERS[kind]
        start = self.take(count * dtype.itemsize, key)
        found = np.frombuffer(self._buffer, dtype, count, start)
        return found != 0 if kind == _BOOL else found

    def _strings(self, key: str) -> list[bytes]:
        count = self.count(f"length of {key}", 8)
        if count > MAX_STRINGS:
            raise ValueError(f"length of {key} is {count}; allowed: at most {MAX_STRINGS} strings")
        # A vocabulary has some hundred thousand strings: this loop takes most of the opening time.
        buffer, size, at, found = self._buffer, self._size, self.at, []
        length_at = _U64.unpack_from
        for index in range(count):
            end = at + 8
            if end <= size:
                end += length_at(buffer, at)[0]
            if end > size:
                raise ValueError(f"string {index} of {key} ends beyond the file of {size} bytes")
            found.append(buffer[at + 8 : end])
            at = end
        self.at = at
        return found


def _header(cursor: _Cursor) -> tuple[int, int]:
    """Read the header; return the numbers of tensors and of metadata keys."""
    start = cursor.take(4, "the magic number")
    magic = cursor._buffer[start : start + 4]
    if magic != MAGIC:
        raise ValueError(f"it starts with {magic!r}; allowed: {MAGIC!r}")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped <= max(VERSIONS):
            raise ValueError("its byte order is big-endian; allowed: little-endian; convert it")
        raise ValueError(f"GGUF version {version}; allowed: {', '.join(map(str, VERSIONS))}")
    # A tensor takes at least 8 bytes for its name and 24 for its description; a key takes 8 and 5.
    tensors = cursor.count("the number of tensors", 0)
    fields = cursor.count("the number of metadata keys", 13)
    if tensors * 32 > len(cursor._buffer):
        raise ValueError(
            f"the number of tensors is {tensors}; the file has {len(cursor._buffer)} bytes"
        )
    return tensors, fields


def _entry(cursor: _Cursor, at: int) -> TensorEntry:
    """Read the next entry of the index; its `start` counts from the end of the index."""
    name = cursor.name(f"name of tensor {at}")
    what = f"tensor {name!r}"
    rank = cursor.u32(f"number of dimensions of {what}")
    if not 1 <= rank <= _MAX_DIMS:
        raise ValueError(f"{what} has {rank} dimensions; allowed: 1 to {_MAX_DIMS}")
    shape = tuple(cursor.u64(f"shape of {what}") for _ in range(rank))[::-1]
    number = cursor.u32(f"type of {what}")
    try:
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise ValueError(f"{what} has the unknown type {number}") from None
    if 0 in shape:
        raise ValueError(f"{what} has shape {shape}; allowed: no axis of length 0")
    if shape[-1] % block:
        raise ValueError(
            f"{what} of {kind.name} has rows of {shape[-1]} elements; allowed: multiples of {block}"
        )
    nbytes = math.prod(shape) // block * block_bytes
    return TensorEntry(name, kind, shape, cursor.u64(f"offset of {what}"), nbytes)


def _placed(
    entries: list[TensorEntry], start: int, alignment: int, size: int
) -> Iterator[TensorEntry]:
    """Yield the entries by offset, with `start` as the offset in the file.

    Raises:
      ValueError: a tensor is misaligned, ends beyond the file, or overlaps the one before.
    """
    free = start
    for entry in sorted(entries, key=lambda entry: entry.start):
        first = start + entry.start
        if entry.start % alignment:
            raise ValueError(
                f"tensor {entry.name!r} has offset {entry.start}; allowed: multiples of {alignment}"
            )
        if first + entry.nbytes > size:
            raise ValueError(
                f"tensor {entry.name!r} needs {entry.nbytes} bytes at offset {first}; "
                f"the file has {size}"
            )
        if first < free:
            raise ValueError(f"tensor {entry.name!r} at offset {first} overlaps the one before")
        free = first + entry.nbytes
        yield TensorEntry(entry.name, entry.kind, entry.shape, first, entry.nbytes)
