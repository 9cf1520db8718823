"""W3C Trace Context: the `traceparent` header, which names the trace that a request belongs to."""

import re
import secrets
from typing import NamedTuple

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceContext(NamedTuple):
    """Where a request stands in a trace.

    Attributes:
      trace_id: 32 hexadecimal digits.
      parent_id: 16 digits: the client's own span.
      span_id: 16 digits: this server's span, made anew.
      flags: 2 digits, the client's.
    """

    trace_id: str
    parent_id: str
    span_id: str
    flags: str

    @property
    def header(self) -> str:
        """The `traceparent` of what this server's span calls, or answers."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


def trace_context(header: str | None) -> TraceContext | None:
    """The context of a `traceparent` header; None where there is none, or none that is valid. Of
    later versions what version 00 knows is read, as the standard says."""
    found = _FORM.fullmatch(header or "")
    if found is None:
        return None
    version, trace_id, parent_id, flags, rest = found.groups()
    if version == "ff" or (version == "00" and rest) or not int(trace_id, 16):
        return None
    if not int(parent_id, 16):
        return None
    return TraceContext(trace_id, parent_id, secrets.token_hex(8), flags)
