"""The tokens that simulated engines choose. Only numpy is imported, so that the engines of another
build can choose the same."""

import numpy as np


def token_at(seed: np.ndarray, position: np.ndarray, vocab_size: int) -> np.ndarray:
    """The tokens i32[B] in [1, vocab_size) of sequences of seeds u32[B] at positions i32[B].

    An integer hash of the two. Token 0 is never chosen, so that it may serve as an end token that
    ends nothing.
    """
    mixed = seed * np.uint32(0x9E3779B1) + position.astype(np.uint32) * np.uint32(0x85EBCA77)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x2C1B3C6D)
    mixed ^= mixed >> np.uint32(12)
    return (mixed % np.uint32(vocab_size - 1)).astype(np.int32) + np.int32(1)


def allowed_tokens(tokens: np.ndarray, rows: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """The tokens i32[B], and in place of those that masks do not allow, the next higher ones that
    they do; after the last comes the first.

    Args:
      rows, bits: as in `interfaces.Masks`.
    """
    tokens = tokens.copy()
    allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")
    for row, mask in zip(rows, allowed, strict=True):
        able = np.flatnonzero(mask)
        tokens[row] = able[np.searchsorted(able, tokens[row]) % len(able)]
    return tokens
