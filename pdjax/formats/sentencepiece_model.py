"""Reads a SentencePiece file: pieces, and how a text is prepared for them.

The file is a protocol buffer, `ModelProto` of sentencepiece_model.proto. The reader skips fields
that a tokenizer does not need.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of pieces."""

UNIGRAM, BPE = 1, 2
"""Kinds of models."""

MAX_PIECE = 1024
"""Most characters of a piece: SentencePiece makes pieces of at most 16 by default."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types: how a field is stored."""


@dataclass(frozen=True)
class Piece:
    """A token: its text, its score, and its kind."""

    text: str
    score: float
    kind: int


@dataclass
class SentencePieceModel:
    """A vocabulary and its rules; defaults are those of the format.

    Attributes:
      pieces: by token id.
      model_type: UNIGRAM or BPE; two other kinds exist.
      byte_fallback: whether text that no piece holds becomes bytes.
      unk_id, bos_id, eos_id: ids of control pieces, below 0 for none.
      unk_piece, bos_piece, eos_piece: their texts.
      charsmap: replacements of characters, compiled; may be empty.
      add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces: how spaces are treated.
    """

    pieces: list[Piece] = field(default_factory=list)
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_piece: str = "<unk>"
    bos_piece: str = "<s>"
    eos_piece: str = "</s>"
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a SentencePiece model.

    Raises:
      ValueError: the file is not readable, or not a SentencePiece model.
    """
    try:
        return _model(path.read_bytes())
    except (OSError, ValueError, IndexError, struct.error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a SentencePiece model ({reason})") from error


def _model(data: bytes) -> SentencePieceModel:
    model = SentencePieceModel()
    for number, value in _fields(data):
        if number == 1:
            model.pieces.append(_piece(_bytes(value)))
        elif number == 2:
            _read_trainer(model, _bytes(value))
        elif number == 3:
            _read_normalizer(model, _bytes(value))
    if not model.pieces:
        raise ValueError("it holds no pieces")
    return model


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _bytes(value).decode()
            if len(text) > MAX_PIECE:
                raise ValueError(f"a piece of {len(text)} characters; allowed: {MAX_PIECE}")
        elif number == 2:
            (score,) = struct.unpack("<f", _bytes(value))
        elif number == 3:
            kind = _int(value)
    return Piece(text, score, kind)


def _read_trainer(model: SentencePieceModel, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 3:
            model.model_type = _int(value)
        elif number == 35:
            model.byte_fallback = bool(_int(value))
        elif number in (40, 41, 42):
            name = {40: "unk_id", 41: "bos_id", 42: "eos_id"}[number]
            setattr(model, name, _int(value))
        elif number in (45, 46, 47):
            name = {45: "unk_piece", 46: "bos_piece", 47: "eos_piece"}[number]
            setattr(model, name, _bytes(value).decode())


def _read_normalizer(model: SentencePieceModel, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 2:
            model.charsmap = _bytes(value)
        elif number in (3, 4, 5):
            name = {
                3: "add_dummy_prefix",
                4: "remove_extra_whitespaces",
                5: "escape_whitespaces",
            }[number]
            setattr(model, name, bool(_int(value)))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and value of each field of a message; fixed-length numbers stay bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, stored = key >> 3, key & 7
        if stored == _VARINT:
            value, place = _varint(data, place)
            yield number, value
            continue
        if stored == _BYTES:
            length, place = _varint(data, place)
        elif stored in (_FIXED64, _FIXED32):
            length = 8 if stored == _FIXED64 else 4
        else:
            raise ValueError(f"a field of the unknown kind {stored} at byte {place}")
        if place + length > len(data):
            raise ValueError("it is cut short")
        yield number, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than ten bytes")


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("a number is expected where bytes are")
    return value - (1 << 64) if value >= 1 << 63 else value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("bytes are expected where a number is")
    return value
