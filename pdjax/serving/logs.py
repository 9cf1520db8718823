"""Structured logs: a JSON object a line, to stderr. They hold no prompt and no answer."""

import fcntl
import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

LOG = logging.getLogger("pdjax.serving")


def event(name: str, level: int = logging.INFO, /, **fields: Any) -> None:
    """Log an event with its fields; those that are None are left out."""
    known = {key: value for key, value in fields.items() if value is not None}
    LOG.log(level, name, extra={"fields": known})


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON: time, level, event, fields; of other loggers' records
    their text. Tracebacks are in `exception`.

    Args:
      always: fields of every line.
    """

    def __init__(self, **always: Any) -> None:
        super().__init__()
        self._always = always

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
        return json.dumps(line, default=str)


class _NotBroken(logging.Filter):
    """Drops what uvicorn says of a response that is broken off on purpose: the server has logged
    why."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "without completing response" not in record.getMessage()


class _InTurn(logging.StreamHandler[TextIO]):
    """Writes a line while no other process does: a pipe takes 4 KiB in one piece, and no more.

    Args:
      lock: the path of a file that all of them lock.
    """

    def __init__(self, lock: str) -> None:
        super().__init__()
        self._file = open(lock, "ab")  # noqa: SIM115 - open as long as the log

    def emit(self, record: logging.LogRecord) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            super().emit(record)
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        self._file.close()
        super().close()


def set_up(level: str = "info", lock: str | None = None, **always: Any) -> None:
    """Let this server's logs, uvicorn's and OpenTelemetry's go to stderr as lines of JSON.

    Args:
      level: of the least important lines.
      lock: a file that is locked while a line is written, where other processes write there, too.
      always: fields of every line.
    """
    handler = logging.StreamHandler() if lock is None else _InTurn(lock)
    handler.setFormatter(JsonLines(**always))
    for name in ("pdjax", "uvicorn", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper() if name == "pdjax" else logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_NotBroken())
