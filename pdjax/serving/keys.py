"""API keys: who may ask. They are compared in constant time, and their names are in the log."""

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ENVIRONMENT = "PDJAX_API_KEYS"
"""The variable that may hold `name:key` pairs, separated by commas."""


class ApiKey(NamedTuple):
    """A key's name and the digest of the key, which is not kept itself."""

    name: str
    digest: bytes


def digest_of(key: str) -> bytes:
    """What is compared: digests have one length, whatever a client sends."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(path: str | None) -> tuple[ApiKey, ...]:
    """The keys of a file, or else of the environment; none where neither is given.

    Args:
      path: a file with `name:key` a line; empty lines and those that begin with # are left out.

    Raises:
      ValueError: a line of another form, a key that is not ASCII, a name that comes twice, or a
        file without a key.
      OSError: the file can't be read.
    """
    if path is not None:
        source = f"api_keys_file={path!r}"
        lines = Path(path).read_text("utf-8").splitlines()
    elif ENVIRONMENT in os.environ:
        source = ENVIRONMENT
        lines = os.environ[ENVIRONMENT].split(",")
    else:
        return ()
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, _, key = (part.strip() for part in line.partition(":"))
        if not name or not key:
            raise ValueError(f"{source}: entry {number} must be name:key")
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"{source}: entry {number}: the key of {name!r} must be of printable ASCII "
                "characters: a header holds no others safely"
            )
        if name in keys:
            raise ValueError(f"{source}: entry {number}: {name!r} comes twice; names must differ")
        keys[name] = ApiKey(name, digest_of(key))
    if not keys:
        raise ValueError(f"{source}: must hold a name:key, or not be given")
    return tuple(keys.values())


def name_of(keys: Iterable[ApiKey], authorization: str | None) -> str | None:
    """The name of the key in an `Authorization: Bearer` header; None where it is none of them.
    Every key is compared, also after a match."""
    scheme, _, key = (authorization or "").partition(" ")
    found, digest = None, digest_of(key.strip())
    for each in keys:
        if hmac.compare_digest(each.digest, digest) and scheme.lower() == "bearer":
            found = each.name
    return found
