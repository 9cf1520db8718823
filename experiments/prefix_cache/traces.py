"""Traces of prompts that share prefixes, by the ids of their blocks.

The small files of `traces/` hold what a replay needs of Mooncake's: a line a request, with the
prompt's tokens and the runs of its block ids, as in "6758 0+1 1+13". They were written by

  python -m experiments.prefix_cache.traces conversation_trace.jsonl conversation.txt.gz
"""

import gzip
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pdjax.workloads.files import read_mooncake

FOLDER = Path(__file__).parent / "traces"
NAMES = ("conversation", "synthetic")
"""The traces of FOLDER."""


class Prompt(NamedTuple):
    """A prompt: its tokens, and ids of its blocks of 512 tokens, of which the last may be partly
    filled. Prompts that begin with the same ids begin with the same tokens."""

    length: int
    blocks: tuple[int, ...]


def read_trace(name: str) -> list[Prompt]:
    """Read the prompts of a trace, in the order of arrival.

    Args:
      name: one of NAMES, or the path of a trace in Mooncake's own form.

    Raises:
      ValueError: a line that is no request, with its number.
      OSError: there is no such file.
    """
    if name not in NAMES:
        return [_of_pieces(pieces) for pieces in (a.pieces for a in read_mooncake(name))]
    with gzip.open(FOLDER / f"{name}.txt.gz", "rt", encoding="ascii") as file:
        return [_of_line(line) for line in file]


def _of_pieces(pieces: Iterable[tuple[str, int]]) -> Prompt:
    keys, lengths = zip(*pieces, strict=True)
    return Prompt(sum(lengths), tuple(int(key.rpartition(" ")[2]) for key in keys))


def _of_line(line: str) -> Prompt:
    length, *runs = line.split()
    pairs = (run.split("+") for run in runs)
    return Prompt(
        int(length), tuple(i for start, n in pairs for i in range(int(start), int(start) + int(n)))
    )


def _runs(blocks: Iterable[int]) -> Iterator[str]:
    start, count = -1, 0
    for block in blocks:
        if count and block == start + count:
            count += 1
            continue
        if count:
            yield f"{start}+{count}"
        start, count = block, 1
    yield f"{start}+{count}"


def write_trace(prompts: Iterable[Prompt], path: Path) -> None:
    """Write prompts in the form of FOLDER; the same prompts give the same bytes."""
    text = "".join(f"{each.length} {' '.join(_runs(each.blocks))}\n" for each in prompts)
    path.write_bytes(gzip.compress(text.encode("ascii"), mtime=0))


if __name__ == "__main__":
    _, source, target = sys.argv
    write_trace(read_trace(source), Path(target))
