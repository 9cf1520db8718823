"""Errors and values in messages of one line."""

import reprlib


def reason_of(error: BaseException) -> str:
    """The class of an error and what it says; the class alone where it cannot be shown."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:
        return name


_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxdict, _SHOWN.maxlist, _SHOWN.maxtuple = 3, 6, 8, 8
_SHOWN.maxstring, _SHOWN.maxlong, _SHOWN.maxother = 100, 60, 60


def one_line(error: BaseException) -> str:
    """What an error says, in one line that isn't long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def shown(value: object) -> str:
    """`repr(value)` in one line, shortened where it is long or deep: files may hold megabytes."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"<integer of {value.bit_length()} bits>"  # Python refuses to write very long ones
    try:
        return " ".join(_SHOWN.repr(value).split())
    except Exception:  # an object may fail to describe itself
        return f"<{type(value).__name__}>"
