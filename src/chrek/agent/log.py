"""Logs: one line a thing that happened, as JSON or as text, with pod, id and phase in every line that has them."""

from __future__ import annotations

import json
import logging
import sys
from typing import Final

from chrek.artifact import timestamp

LOGGER: Final = logging.getLogger("chrek.agent")
_CONTEXT: Final = ("pod", "id", "phase", "reason", "container", "seconds")


class _Formatter(logging.Formatter):
    def _fields(self, record: logging.LogRecord) -> dict[str, object]:
        context = {name: value for name in _CONTEXT if (value := getattr(record, name, None)) not in (None, "")}
        trace = {"exception": self.formatException(record.exc_info)} if record.exc_info else {}
        return {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **context,
            **trace,
        }


class _Json(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self._fields(record), ensure_ascii=False)


class _Text(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = self._fields(record)
        head = f"{fields.pop('time')} {str(fields.pop('level')).upper():<7} {fields.pop('message')}"
        return " ".join([head, *(f"{name}={value}" for name, value in fields.items())])


def start(*, form: str, level: str) -> None:
    """Send everything of this level and above to standard error in that form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    LOGGER.handlers = [handler]
    LOGGER.setLevel(level.upper())
    LOGGER.propagate = False


def log(level: int, message: str, **context: object) -> None:
    """Write a line; *context* is pod, id, phase, reason, container or seconds."""
    LOGGER.log(level, "%s", message, extra=context)


def info(message: str, **context: object) -> None:
    """Write a line about something that is as it should be."""
    log(logging.INFO, message, **context)


def warning(message: str, **context: object) -> None:
    """Write a line about something that somebody may want to look at."""
    log(logging.WARNING, message, **context)


def debug(message: str, **context: object) -> None:
    """Write a line for those who look for a fault."""
    log(logging.DEBUG, message, **context)
