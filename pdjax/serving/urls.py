"""What flags name as URLs."""

from urllib.parse import SplitResult, urlsplit


def url_parts(url: str) -> SplitResult | None:
    """The parts of a URL; None where its host or port can't be: a port is in [1, 65536)."""
    try:
        parts = urlsplit(url)
        return parts if parts.hostname and parts.port != 0 else None
    except ValueError:  # of the port, or of the brackets around an address
        return None
