"""Poisoned rows, in numpy: the numbers in some rows of a batch must change no bit of other rows.

Each operation's cases have a function `poisoned`, which makes a batch with such rows and tells
which outputs must keep their bits and which must not be finite.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

VALUES = {"NaN": float("nan"), "infinity": float("inf"), "3e38": 3e38}
"""Values of poison. 3e38 is finite, but some products of it are not."""


@dataclass(frozen=True)
class Poisoned:
    """A batch in which some rows are poisoned.

    Attributes:
      operands: positional arguments of the operation.
      spared: selects from the outputs the numbers that must have the same bits as without poison.
      spoiled: selects from the outputs arrays [rows, ...]; if the poison is not finite, each row
        must hold a number that is not finite.
      sound: whether the outputs are otherwise valid.
    """

    operands: tuple[Any, ...]
    spared: Callable[[Any], Any]
    spoiled: Callable[[Any], list[np.ndarray]]
    sound: Callable[[Any], bool] = lambda outputs: True


def some(count: int) -> np.ndarray:
    """Choose the rows to poison, bool[count]: every third row, beginning with the second."""
    return np.arange(count) % 3 == 1


def fault(
    value: float, without: Any, poisoned: Poisoned, outputs: Any, same_bits: Callable[..., bool]
) -> str | None:
    """Name the fault in the outputs of a poisoned batch, or return None.

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
    """Poison one number of every third row, in the operands at `places` in turn.

    The operation's outputs must have a row for each row of its first operand, [T, ...].
    """
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
