"""Writes GGUF files byte by byte, so that they may hold fields that no writer would write."""

import math
import struct
from pathlib import Path
from typing import Any

STRING, ARRAY, U32 = 8, 9, 4


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def field(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def write(
    path: Path,
    fields: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 256,
) -> Path:
    counts = counts or (len(tensors), len(fields))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(fields) + b"".join(tensors)
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(data))
    return path


def strings(count: int, *values: bytes) -> bytes:
    return struct.pack("<IQ", STRING, count) + b"".join(map(text, values))


NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


def kind_of(value: Any) -> int:
    """Return the GGUF type of a Python value."""
    if isinstance(value, bool):
        return 7
    if isinstance(value, int):
        return 4 if 0 <= value < 1 << 32 else 10 if value >= 0 else 11
    if isinstance(value, float):
        return 6 if not math.isfinite(value) or abs(value) < 3e38 else 12
    return STRING if isinstance(value, str | bytes) else ARRAY


def encoded(key: str, value: Any) -> bytes:
    """Encode a field with a Python value: a bool, a number, a string, bytes, or a list of values of
    one kind. Numbers that do not fit are cut to 64 bits.
    """
    kind = kind_of(value)
    if kind == ARRAY:
        inner = kind_of(value[0]) if value else STRING
        if inner == STRING:
            return field(key, ARRAY, strings(len(value), *(_raw(item) for item in value)))
        packed = struct.pack(f"<{len(value)}{NUMBERS[inner]}", *value)
        return field(key, ARRAY, struct.pack("<IQ", inner, len(value)) + packed)
    if kind == STRING:
        return field(key, STRING, text(value))
    if kind in (10, 11):
        value = value % (1 << 64) if kind == 10 else max(value, -(1 << 63))
    return field(key, kind, struct.pack(f"<{NUMBERS[kind]}", value))


def _raw(item: str | bytes) -> bytes:
    return item.encode() if isinstance(item, str) else item
