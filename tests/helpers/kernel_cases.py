"""Choice among the cases of a kernel's folder.

The reference runs at all of them, and so does every implementation in `pallas_kernels.check`, on
hardware. An interpreter takes a second a case, and a lowering another: tests leave out cases whose
edges another one has, too.
"""

from collections.abc import Iterable
from typing import Any


def without(cases: Iterable[Any], *names: str) -> list[Any]:
    """List the cases but those of these names.

    Raises:
      ValueError: a name is none of the cases', or several have it.
    """
    left = list(cases)
    for name in names:
        named = [case for case in left if case.name == name]
        if len(named) != 1:
            raise ValueError(f"names: {name!r} must be the name of one case, not {len(named)}")
        left.remove(named[0])
    return left
