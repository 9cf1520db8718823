"""Opens a GGUF model in several files, NAME-00001-of-00003.gguf and so on, as llama.cpp splits it.

The first shard holds all metadata. Every shard stores its number, the number of shards, and the
number of tensors of the model.
"""

import re
from pathlib import Path

from pdjax.core.messages import shown
from pdjax.formats.gguf_file import GGUFFile

_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)?", re.I)


def open_shards(path: Path) -> list[GGUFFile]:
    """Open the files of the model that begins with `path`: one file, or all shards of a split.

    Raises:
      ValueError: a shard is unreadable, missing, or not the one that its name says, or `path` is
        not the first; the message says which file to open.
    """
    first = open_first(path)
    count = _integer(first, _COUNT, 1)
    if count <= 1:
        return [first]
    name = _NAME.fullmatch(path.name)
    if name is None or int(name["number"]) != 1 or int(name["count"]) != count:
        raise ValueError(
            f"model={str(path)!r}: {_COUNT}={count}, but the name is not that of the first of "
            f"{count} shards; allowed: NAME-00001-of-{count:05}.gguf"
        )
    paths = [path.with_name(_shard_name(name, number)) for number in range(1, count + 1)]
    if missing := next((shard for shard in paths if not shard.is_file()), None):
        raise ValueError(
            f"model={str(path)!r}: shard {missing.name} is missing; a split into {count} needs "
            f"all of {paths[0].name} to {paths[-1].name} in one folder"
        )
    shards = [first, *(_open_further(shard, index, count) for index, shard in enumerate(paths[1:]))]
    _check_tensors(first, shards)
    return shards


def open_first(path: Path) -> GGUFFile:
    """Open the file `path`, a whole model or the first shard of a split.

    Raises:
      ValueError: it is unreadable, or a later shard; the message says which file to open.
    """
    file = GGUFFile(path)
    number = _integer(file, _NUMBER, 0)
    if number:
        name = _NAME.fullmatch(path.name)
        first = _shard_name(name, 1) if name else "the first shard"
        raise ValueError(
            f"model={str(path)!r}: {_NUMBER}={number}, a later shard of a split model; open {first}"
        )
    return file


def _open_further(path: Path, index: int, count: int) -> GGUFFile:
    file = GGUFFile(path)
    for key, expected in ((_NUMBER, index + 1), (_COUNT, count)):
        found = file.fields.get(key)
        if found != expected:
            raise ValueError(
                f"model={str(path)!r}: {key}={shown(found)}; allowed: {expected}, as the first "
                "shard and the name say"
            )
    return file


def _check_tensors(first: GGUFFile, shards: list[GGUFFile]) -> None:
    owner: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor in owner:
                raise ValueError(
                    f"model={str(first.path)!r}: tensor {tensor!r} is in {owner[tensor]} and in "
                    f"{shard.path.name}; allowed: one shard"
                )
            owner[tensor] = shard.path.name
    expected = _integer(first, _TENSORS, len(owner))
    if len(owner) != expected:
        raise ValueError(
            f"model={str(first.path)!r}: {_TENSORS}={expected}, but the {len(shards)} shards hold "
            f"{len(owner)} tensors"
        )


def _integer(file: GGUFFile, key: str, default: int) -> int:
    value = file.fields.get(key, default)
    if type(value) is not int or value < 0:
        raise ValueError(
            f"model={str(file.path)!r}: {key}={shown(value)}; allowed: an integer from 0"
        )
    return value


def _shard_name(name: re.Match[str], number: int) -> str:
    return f"{name['stem']}-{number:05}-of-{name['count']}{name['suffix'] or ''}"
