"""Configure the program's log: structured records with stable event names, on stderr.

The records are text for people or JSON lines. Never writes to stdout.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog
from structlog.typing import EventDict

from cdcbridge.words import as_text


def configure(log_format: Literal["text", "json"], level: str) -> None:
    """Set up structlog once, before the first record."""
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    last: list[structlog.typing.Processor] = (
        [structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [for_people, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=24)]
    )
    structlog.configure(
        processors=[structlog.processors.add_log_level, stamp, structlog.processors.format_exc_info, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


class _Shown(str):
    """A text whose repr() escapes nothing, so that SQL can be copied from the log.

    The repr() has quotes around it only if the text contains a blank.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f'"{self}"' if " " in self else str(self)


def for_people(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Format each value for people, and leave out empty values.

    For example, a record contains `added=billing`, but no `changed=()`.
    """
    kept = ("event", "level", "timestamp", "exception")
    return {
        key: value if key in kept else _Shown("; ".join(line.strip() for line in as_text(value).splitlines()))
        for key, value in event.items()
        if value is not None and not (isinstance(value, str | list | tuple | dict) and not value)
    }
