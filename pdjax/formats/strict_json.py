"""Writes JSON by RFC 8259, in ASCII, so that any reader takes it and any stream can carry it."""

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """Write `value` as JSON text. A float that is not finite becomes null: JSON cannot express it.

    Args:
      value: anything that `json.dumps` takes.
      options: options of `json.dumps`, such as `indent`.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_key(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value


def _key(key: Any) -> Any:
    """Name a key that is a float but not finite: "nan", "inf" or "-inf"."""
    return str(key) if isinstance(key, float) and not math.isfinite(key) else key
