"""Numbers for a reader, and the round numbers that an axis is marked with."""

import math


def shown(value: object) -> str:
    """Write a cell of a table: a float with four digits, a whole number in full, a dash for None.

    A float that is not finite is written as a dash, too: there is nothing to read off it.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"  # noqa: RUF001 - what a reader of tables expects
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _four_digits(value)
    return str(value)


def _four_digits(value: float) -> str:
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -4 <= size < 9:
        return f"{value:.3e}"
    text = f"{value:,.{max(0, 3 - size)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def round_steps(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that cover [low, high]: multiples of 1, 2, 2.5 or 5 times a power of ten.

    Args:
      low, high: finite; where they are the same, the steps lie around them.
      most: steps between marks, at most.

    Returns:
      at least two marks, of which the first is at most `low` and the last at least `high`.
    """
    if high <= low:
        room = abs(low) or 1.0
        low, high = (low, high + room) if low >= 0 else (low - room, high)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(
        factor * power
        for factor in (1, 2, 2.5, 5, 10)
        if math.ceil(high / (factor * power)) - math.floor(low / (factor * power)) <= most
        or factor == 10
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def round_powers(low: float, high: float) -> list[float]:
    """Round numbers that cover [low, high], both above 0, on a logarithmic axis: powers of ten, and
    2 and 5 times those where there are few, or powers of two where a decade is not covered."""
    if high <= low:
        low, high = low / 2, high * 2
    if high / low < 10:
        first, last = math.floor(math.log2(low) + 1e-9), math.ceil(math.log2(high) - 1e-9)
        return [2.0**power for power in range(first, last + 1)]
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    marks = [factor * 10.0**power for power in range(first, last) for factor in factors]
    return [*marks, 10.0**last]
