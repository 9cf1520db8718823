"""Why a request failed, in words for its user."""


def reason_of(error: BaseException) -> str:
    """The class of an error and what it says; the class alone where it cannot be shown."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:
        return name
