"""Tensors of all experts that files keep in several: by expert, as transformers 4 does, or by part,
as llama.cpp does.

A piece is a run of rows of a tensor in a file. The pieces of a tensor, one after another, are its
rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pdjax.core.model_spec import ModelSpec
from pdjax.device.models.family import Tensor


class Piece(NamedTuple):
    """Rows from `first` on of the tensor `name` of a file."""

    name: str
    first: int


@dataclass(frozen=True)
class Pieces:
    """Those of one tensor.

    Attributes:
      pieces: in the order of the tensor's rows.
      rows: of each piece.
      shape: of each tensor of the file that they are of.
    """

    pieces: tuple[Piece, ...]
    rows: int
    shape: tuple[int, ...]

    @classmethod
    def by_expert(cls, tensor: Tensor, spec: ModelSpec, prefix: str) -> "Pieces":
        """Those of files with tensors of their own for each expert and part; `prefix` comes before
        the names of a layer's tensors."""
        experts, rows, cols = tensor.stored_shape(spec)
        names = [prefix + part.format(i) for i in range(experts) for part in tensor.of_expert]
        rows //= len(tensor.of_expert)
        return cls(tuple(Piece(name, 0) for name in names), rows, (rows, cols))

    @classmethod
    def by_part(cls, tensor: Tensor, spec: ModelSpec, prefix: str) -> "Pieces":
        """Those of GGUF files with a tensor for each part, of all experts; see `by_expert`."""
        experts, rows, cols = tensor.stored_shape(spec)
        names = [prefix + part for part in tensor.gguf_parts]
        rows //= len(names)
        pieces = tuple(Piece(name, i * rows) for i in range(experts) for name in names)
        return cls(pieces, rows, (experts, rows, cols))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the file, by name, and their shapes."""
        return dict.fromkeys((piece.name for piece in self.pieces), self.shape)

    def read(self, rows: slice, read: Callable[[str, slice], np.ndarray]) -> np.ndarray:
        """Rows of the tensor, made of what `read` returns of the rows of a tensor of the file."""
        parts = []
        for index, part in runs(rows, self.rows, len(self.pieces)):
            name, first = self.pieces[index]
            parts.append(read(name, slice(first + part.start, first + part.stop)))
        return np.concatenate(parts)


def runs(rows: slice, each: int, count: int) -> Iterator[tuple[int, slice]]:
    """Cut a run of rows where matrices end, of which there are `count`, with `each` rows: yield
    which matrix, and its rows. There is at least one, which may be empty."""
    start, stop, _ = rows.indices(each * count)
    first = min(start // each, count - 1)
    for index in range(first, max(-(-stop // each), first + 1)):
        begin, end = max(start - index * each, 0), min(stop - index * each, each)
        yield index, slice(begin, max(begin, end))
