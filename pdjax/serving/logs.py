"""Structured logs: a JSON object a line, to stderr. They hold no prompt and no answer."""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

LOG = logging.getLogger("pdjax.serving")


def event(name: str, level: int = logging.INFO, /, **fields: Any) -> None:
    """Log an event with its fields; those that are None are left out."""
    known = {key: value for key, value in fields.items() if value is not None}
    LOG.log(level, name, extra={"fields": known})


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON: time, level, event, fields; of other loggers' records
    their text. Tracebacks are in `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        moment = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
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


def set_up(level: str = "info") -> None:
    """Let this server's logs, uvicorn's and OpenTelemetry's go to stderr as lines of JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("pdjax", "uvicorn", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper() if name == "pdjax" else logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_NotBroken())
