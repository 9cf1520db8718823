"""Poisoned neighbours, in numpy: what some rows of a batch hold must change no bit of the others.

Each operation's cases say by `poisoned` what a batch with such rows is, and what of its outputs is
whose.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

VALUES = {"NaN": float("nan"), "infinity": float("inf"), "3e38": 3e38}
"""What the rows hold. Some products of the last, which is finite, are not."""


@dataclass(frozen=True)
class Poisoned:
    """A batch in which some rows are poisoned.

    Attributes:
      operands: positional arguments of the operation.
      spared: of the outputs, those numbers that must have the same bits as without poison.
      spoiled: of the outputs, [rows, ...], each of which rows must have a number in it that is not
        finite, where the poison is not.
      sound: whether the outputs are right otherwise.
    """

    operands: tuple[Any, ...]
    spared: Callable[[Any], Any]
    spoiled: Callable[[Any], list[np.ndarray]]
    sound: Callable[[Any], bool] = lambda outputs: True


def some(count: int) -> np.ndarray:
    """bool[count]: every third row, which is to be poisoned; not the first."""
    return np.arange(count) % 3 == 1


def fault(
    value: float, without: Any, poisoned: Poisoned, outputs: Any, same_bits: Callable[..., bool]
) -> str | None:
    """What is wrong with the outputs of a poisoned batch, or None.

    Args:
      without: the outputs without poison.
    """
    if not same_bits(poisoned.spared(outputs), poisoned.spared(without)):
        return "NEIGHBOURS CHANGE"
    if not poisoned.sound(outputs):
        return "UNSOUND PAGES"
    if not np.isfinite(value):
        for rows in poisoned.spoiled(outputs):
            finite = np.isfinite(rows.astype(np.float32))
            if finite.all(axis=tuple(range(1, rows.ndim))).any():
                return "POISON IS LOST"
    return None


def poisoned_rows(
    operands: tuple[Any, ...], value: float, *, places: tuple[int, ...] = (0,)
) -> Poisoned:
    """Of an operation whose outputs have a row for each row of its first operand, [T, ...]: one
    number of every third row is poisoned, in the operands at these places in turn."""
    changed = list(operands)
    which = np.flatnonzero(some(len(operands[0])))
    for i, row in enumerate(which):
        place = places[i % len(places)]
        if changed[place] is operands[place]:
            changed[place] = operands[place].copy()
        flat = changed[place][row].reshape(-1)
        flat[(7 * i) % len(flat)] = value
    left = np.delete(np.arange(len(operands[0])), which)
    return Poisoned(
        tuple(changed),
        spared=lambda outputs: jax.tree.map(lambda x: x[left], outputs),
        spoiled=lambda outputs: [jax.tree.leaves(outputs)[0][which]],
    )
