"""The server's log: one JSON object a line."""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
from datetime import UTC, datetime
from logging.handlers import QueueHandler
from typing import Any, TextIO

LOGGER = logging.getLogger("d2f.serving")
"""Requests at level INFO, faults with their traceback at ERROR."""

_MOST_LINES = 10_000


def log_request(fields: dict[str, Any]) -> None:
    """Log the end of a request as a line with these fields."""
    if LOGGER.isEnabledFor(logging.INFO):
        LOGGER.info("request", extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON.

    Example:
        >>> record = logging.makeLogRecord({"msg": "hi", "created": 0, "levelno": 20})
        >>> JsonFormatter().format(record)
        '{"time": "1970-01-01T00:00:00.000+00:00", "level": "info", "message": "hi"}'
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback stands in its field `traceback`."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        }
        fields = getattr(record, "fields", None)
        if fields is None:
            level = logging.getLevelName(max(record.levelno, logging.INFO)).lower()
            line |= {"level": level, "message": record.getMessage()}
        else:
            line |= fields
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _LossyHandler(QueueHandler):
    """Hands records to the thread that writes, and drops them if that cannot keep up."""

    def prepare(self, record: logging.LogRecord) -> str:
        return self.format(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], queue.Full):
            super().handleError(record)


class LogWriter:
    """Writes the log from a thread of its own: a pipe that nobody reads must not stop the server.

    A context; at its end the remaining lines are written, unless that takes over a second.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(_MOST_LINES)
        self._handler = _LossyHandler(self._lines)
        self._handler.setFormatter(JsonFormatter())
        self._thread = threading.Thread(target=self._write, name="d2f-log", daemon=True)
        # At INFO uvicorn tells of its own start and end, which the log does not need.
        self._levels = {LOGGER: logging.INFO, logging.getLogger("uvicorn"): logging.WARNING}

    def __enter__(self) -> LogWriter:
        self._thread.start()
        for logger, level in self._levels.items():
            logger.setLevel(level)
            logger.addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        for logger in self._levels:
            logger.removeHandler(self._handler)
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(timeout=1.0)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                # The reader has gone; the server goes on.
                return
