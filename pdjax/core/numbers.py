"""What counts as a number in the fields of a request."""

import math
import sys
import typing
from contextlib import suppress
from numbers import Integral, Real
from typing import Any

import numpy as np


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no bool."""
    if isinstance(value, float):
        return math.isfinite(value)
    return is_int(value) and abs(typing.cast(int, value)) <= sys.float_info.max


def plain(value: Any) -> Any:
    """A scalar of numpy as the number that it is; anything else as it is."""
    if isinstance(value, (bool, np.bool_)) or type(value) in (int, float):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        with suppress(OverflowError):
            return float(value)
    return value


def is_int(value: object) -> bool:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)
