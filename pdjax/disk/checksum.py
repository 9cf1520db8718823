"""Checksums of payloads.

Each header says how its payload was summed up. XXH3 (the package xxhash) keeps up with any disk: it
sums 17 GB/s on a core of two GHz on which `zlib.crc32` sums 1.3 and BLAKE2b 0.2. Without the
package the standard library's CRC-32 serves, and costs a core for every 1.3 GB/s. Neither is proof
against an adversary, who could as well write a right checksum.
"""

from collections.abc import Callable, Mapping
from zlib import crc32

import numpy as np

try:
    import xxhash
except ImportError:
    xxhash = None

CRC32, XXH3 = 1, 2


def _crc32(payload: np.ndarray) -> int:
    return crc32(memoryview(payload))


def _xxh3(payload: np.ndarray) -> int:
    return int(xxhash.xxh3_64_intdigest(memoryview(payload)))


SUMS: Mapping[int, Callable[[np.ndarray], int]] = (
    {CRC32: _crc32} if xxhash is None else {CRC32: _crc32, XXH3: _xxh3}
)
"""What sums up a payload u8[n], by its number in headers; those that can be used here."""

FASTEST = max(SUMS)
"""What new payloads are summed up with."""
