"""Workloads in files: a form of our own that can be replayed, and public traces."""

import csv
import datetime
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from pdjax.core.slo import SLO
from pdjax.formats.strict_json import dumps
from pdjax.workloads.arrival import Arrival, Piece
from pdjax.workloads.chances import generator

MOONCAKE_BLOCK = 512
"""Tokens that a hash id of Mooncake's traces stands for."""

_DEFAULTS = {
    each.name: each.default if each.default_factory is MISSING else each.default_factory()
    for each in fields(Arrival)
}


def write_workload(path: str | Path, arrivals: Iterable[Arrival]) -> None:
    """Write a workload as lines of JSON, one a request; its keys are the fields of `Arrival`, but
    for those that have their defaults. Folders on the way are made.

    Raises:
      OSError: it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for each in arrivals:
            told = {name: getattr(each, name) for name in _DEFAULTS}
            told["pieces"], told["labels"] = tuple(each.pieces), dict(each.labels)
            if each.slo is not None:
                told["slo"] = {k: v for k, v in asdict(each.slo).items() if v is not None}
            file.write(dumps({k: v for k, v in told.items() if v != _DEFAULTS[k]}) + "\n")


def read_workload(path: str | Path, *, limit: int | None = None) -> list[Arrival]:
    """Read what `write_workload` has written.

    Args:
      path: of the file.
      limit: reads so many requests; None reads all.

    Raises:
      ValueError: a line that is no request, with its number.
      OSError: the file cannot be read.
    """
    return [_read(path, number, line) for number, line in itertools.islice(_lines(path), limit)]


def _read(path: str | Path, number: int, line: dict[str, Any]) -> Arrival:
    try:
        unknown = sorted(line.keys() - _DEFAULTS.keys())
        if unknown:
            raise ValueError(f"{unknown[0]}: no such key; allowed are {', '.join(_DEFAULTS)}")
        pieces = tuple(Piece(str(key), int(length)) for key, length in line.pop("pieces", ()))
        if (bounds := line.pop("slo", None)) is not None:
            line["slo"] = SLO(**bounds)
        return Arrival(**line, pieces=pieces)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}:{number}: {error}") from error


def _lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line of a file of JSON lines; empty lines are passed over."""
    with Path(path).open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: no JSON: {error}") from error
            if not isinstance(line, dict):
                raise ValueError(f"{path}:{number}: must be an object of JSON")
            yield number, line


def read_mooncake(
    path: str | Path, *, limit: int | None = None, spread: float = 0.0, seed: int = 0
) -> list[Arrival]:
    """Read a trace of Mooncake (Qin et al., FAST 2025): lines of JSON with `timestamp`
    (milliseconds), `input_length`, `output_length` and `hash_ids`, each of which stands for a block
    of 512 tokens. The tokens of a block are made from its hash id, so that prompts that begin with
    the same ids begin with the same tokens.

    Args:
      path: of the file.
      limit: reads so many requests; None reads all.
      spread: seconds over which each timestamp is spread by chance: those of the conversation
        trace are quantised to about 3 s, which would let requests come in bursts.
      seed: of that chance.

    Raises:
      ValueError: a line of another form, with its number.
      OSError: the file cannot be read.
    """
    made = []
    for number, line in itertools.islice(_lines(path), limit):
        try:
            prompt, hashes = int(line["input_length"]), list(line["hash_ids"])
            # Few requests have no output token in such traces; one is the least there is here.
            output, moment = max(1, int(line["output_length"])), float(line["timestamp"]) / 1e3
            whole = [MOONCAKE_BLOCK] * (prompt // MOONCAKE_BLOCK)
            rest = prompt % MOONCAKE_BLOCK
            lengths = [*whole, rest] if rest else whole
            if len(hashes) != len(lengths):
                raise ValueError(f"hash_ids: {len(hashes)}; must be {len(lengths)}")
            pairs = zip(hashes, lengths, strict=True)
            pieces = tuple(Piece(f"block {hash_id}", length) for hash_id, length in pairs)
            made.append(Arrival(moment, prompt, output, pieces=pieces))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return _spread(made, spread, seed)


def read_azure(path: str | Path, *, limit: int | None = None, seed: int = 0) -> list[Arrival]:
    """Read a trace of Azure's LLM inference (Patel et al., Splitwise, ISCA 2024): CSV with
    TIMESTAMP, ContextTokens and GeneratedTokens. Prompts share nothing.

    Args:
      path: of the file.
      limit: reads so many requests; None reads all.
      seed: decides the tokens of prompts.

    Raises:
      ValueError: no such columns, or a line of another form, with its number.
      OSError: the file cannot be read.
    """
    made, start = list[Arrival](), None
    with Path(path).open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(itertools.islice(csv.DictReader(file), limit)):
            try:
                moment = _azure_moment(row["TIMESTAMP"])
                start = moment if start is None else start
                prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
                own = (Piece(f"azure {seed} of {number}", max(1, prompt)),)
                after = (moment - start) / 1e7
                made.append(Arrival(after, max(1, prompt), max(1, output), pieces=own))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number + 2}: {error}") from error
    return made


def _azure_moment(text: str) -> int:
    """A moment such as "2023-11-16 18:17:03.9799600", in units of 100 ns."""
    whole, _, rest = text.partition(".")
    at = datetime.datetime.fromisoformat(whole)
    seconds = (at - datetime.datetime(1970, 1, 1)) // datetime.timedelta(seconds=1)
    return seconds * 10**7 + int((rest or "0").ljust(7, "0")[:7])


def _spread(arrivals: list[Arrival], spread: float, seed: int) -> list[Arrival]:
    if spread < 0:
        raise ValueError(f"spread={spread}: must be 0 or more seconds")
    if spread == 0:
        return arrivals
    moved = generator(seed, "spread").uniform(0.0, spread, len(arrivals)).tolist()
    later = [replace(a, moment=a.moment + by) for a, by in zip(arrivals, moved, strict=True)]
    return sorted(later, key=lambda arrival: arrival.moment)
