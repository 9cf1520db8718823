"""Replaces a method of one object, to observe its calls."""

from collections.abc import Callable
from typing import Any


def replace_method(target: Any, name: str, function: Callable[..., Any]) -> None:
    """Replace the method `name` of `target` alone, and not of its class."""
    setattr(target, name, function)
