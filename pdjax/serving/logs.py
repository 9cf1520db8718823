"""Structured logs: a JSON object a line, to stderr. They hold no prompt and no answer.

Several processes may write to one pipe. It takes 4 KiB in one piece: longer lines would be torn, so
those of fronts are cut to that. A lock instead would let a process that stops in the middle of a
line stop all others.
"""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

LOG = logging.getLogger("pdjax.serving")

IN_ONE_PIECE = 4096
"""Bytes that Linux writes into a pipe in one piece."""


def event(name: str, level: int = logging.INFO, /, **fields: Any) -> None:
    """Log an event with its fields; those that are None are left out."""
    known = {key: value for key, value in fields.items() if value is not None}
    LOG.log(level, name, extra={"fields": known})


_CUT = "[...] "


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON: time, level, event, fields; of other loggers' records
    their text. Tracebacks are in `exception`.

    Args:
      most: bytes of a line with its end; a longer one has its longest text cut, of which the end
        stays. None cuts none.
      always: fields of every line.
    """

    def __init__(self, most: int | None = None, **always: Any) -> None:
        super().__init__()
        self._most, self._always = most, always

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        moment = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **self._always,
            **fields,
        }
        if record.name != LOG.name:
            line["logger"] = record.name
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        written = json.dumps(line, default=str)  # of ASCII
        if self._most is None or len(written) < self._most:
            return written
        longest = max(line, key=lambda name: len(str(line[name])))
        line[longest] = _CUT + str(line[longest])[len(written) + len(_CUT) + 1 - self._most :]
        return json.dumps(line, default=str)


class _NotBroken(logging.Filter):
    """Drops what uvicorn says of a response that is broken off on purpose: the server has logged
    why."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "without completing response" not in record.getMessage()


def set_up(level: str = "info", *, shared: bool = False, **always: Any) -> None:
    """Let this server's logs, uvicorn's and OpenTelemetry's go to stderr as lines of JSON.

    Args:
      level: of the least important lines.
      shared: whether other processes write there, too.
      always: fields of every line.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(IN_ONE_PIECE if shared else None, **always))
    for name in ("pdjax", "uvicorn", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper() if name == "pdjax" else logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_NotBroken())
