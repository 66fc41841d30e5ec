"""Evaluate a sink's transform: a CEL expression that gives a map, which is delivered instead of the message.

It reads the same variables as a filter. For example, `{'id': record.id, 'total': record.price * record.quantity}`. The
module is pure.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import orjson

from cdcbridge.routing.filters import Filter, FilterError


class Transform:
    """One compiled expression.

    Raises:
        ValueError: The source is not valid CEL, or uses an unknown variable or function.
    """

    def __init__(self, source: str) -> None:
        self._expression = Filter(source)

    def body(self, environment: dict[str, Any]) -> bytes:
        """Return the map that the expression gives for a message, as JSON text.

        Args:
            environment: A value for each variable.

        Raises:
            FilterError: The expression failed on these values, or gives no map, or a map that JSON cannot hold.
        """
        result = self._expression.value(environment)
        if not isinstance(result, dict):
            raise FilterError(f"the transform gave {type(result).__name__} {result!r}, not a map")
        try:
            return orjson.dumps(result, default=_as_json, option=orjson.OPT_NON_STR_KEYS)
        except TypeError as error:
            raise FilterError(f"the transform gave a map that JSON cannot hold: {error}") from error


def _as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, dt.timedelta):
        return f"{value.total_seconds():g}s"
    raise TypeError(type(value).__name__)
