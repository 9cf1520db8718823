"""Methods of single objects, replaced to be watched."""

from collections.abc import Callable
from typing import Any


def replace_method(target: Any, name: str, function: Callable[..., Any]) -> None:
    """Let `target` alone, and not its class, have another method of that name."""
    setattr(target, name, function)
