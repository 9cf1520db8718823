# ruff: noqa: UP007, UP045 (old and new ways to write a type)
"""Functions that are given to a model as tools."""

import enum
from collections.abc import Callable
from typing import Any, Literal, Optional, Union


class Unit(enum.Enum):
    C = "celsius"
    F = "fahrenheit"


def weather(city: str, days: list[int], unit: Unit = Unit.C) -> dict[str, Any]:
    """
    Get the weather.

    It is made up: nobody measures
    anything.

    Args:
        city: The city, e.g. "Paris, France"
        days (list): Days from now: 0 is today,
            1 tomorrow
        unit: Of the temperature

    Returns:
        What the weather is,
        by day.

    Raises:
        ValueError: no such city
    """
    return {}


def drink(name: Literal["tea", "coffee", 3], hot: bool = True, size: float | None = None) -> None:
    """Drink something

    Args:
      name: What to drink (choices: ["tea ", "coffee"])
      hot: Hot?

      size: How much
    """


def everything(
    a: Optional[int],
    b: Union[int, str],
    c: int | list[str] | None,
    d: tuple[int, str],
    e: dict[str, float],
    f: Any,
    g: list,
    h: dict,
    i: list | tuple,
    j: list[dict[str, list[int]]],
) -> "list[object]":
    """Everything. Args: are below

    Args:
        a: 1
        b: 2
        c: 3
        d: 4
        e: 5
        f: 6
        g: 7
        h: 8
        i: 9
        j: 10
    Returns:
        Nothing.
    """
    return []


def nothing() -> int:
    """Take nothing."""
    return 0


class Tools:
    def method(self, x: int = 3) -> str:
        """A method

        Args:
            x: a number
        """
        return str(x)


def no_docstring(x: int) -> None:
    pass


def no_type(x) -> None:
    """No type.

    Args:
        x: something
    """


def no_description(x: int) -> None:
    """No description."""


def no_json(x: Callable[[], None]) -> None:
    """No type of JSON.

    Args:
        x: something
    """


FUNCTIONS: list[Callable[..., Any]] = [
    *(weather, drink, everything, nothing, Tools().method, Tools.method),
    *(no_docstring, no_type, no_description, no_json),
]
