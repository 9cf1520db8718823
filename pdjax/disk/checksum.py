"""The checksum of a payload."""

from zlib import crc32

import numpy as np


def checksum(payload: np.ndarray) -> int:
    """Sum up a payload u8[n]."""
    return crc32(memoryview(payload))
