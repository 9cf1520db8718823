"""Formats errors and values for messages of one line."""

import reprlib


def reason_of(error: BaseException) -> str:
    """Return an error's class and text; only the class where `str` of the error fails."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:
        return name


def prompt_too_long(tokens: int, context: int) -> str:
    """What is said of a prompt that leaves no room for an answer."""
    return (
        f"prompt_token_ids: {tokens} tokens, but the context is {context} (model.max_model_len) "
        f"and one must be left to generate; allowed are at most {context - 1}"
    )


_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxdict, _SHOWN.maxlist, _SHOWN.maxtuple = 3, 6, 8, 8
_SHOWN.maxstring, _SHOWN.maxlong, _SHOWN.maxother = 100, 60, 60


def one_line(error: BaseException) -> str:
    """Return an error's text in one line of at most 300 characters; its class if it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def shown(value: object) -> str:
    """Return `repr(value)` in one line, shortened where long or deep: files may hold megabytes."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"<integer of {value.bit_length()} bits>"  # Python refuses to print very long ones
    try:
        return " ".join(_SHOWN.repr(value).split())
    except Exception:  # an object's own __repr__ may fail
        return f"<{type(value).__name__}>"
