"""Word the reasons of dead letters that a verdict makes, each in one place.

People search for the words before the colon, for example `cdcbridge dead list billing --reason oversized:`. Therefore
these words must never change. SQL words its own reasons, for example `publish()` for a message that is too large. The
module is pure.
"""

from __future__ import annotations

from typing import Final

FILTER_ERROR: Final = "filter_error: "


def oversized(size: int, limit: int) -> str:
    """Return the reason of a message whose `data` has more bytes than the consumer's max_message_bytes."""
    return f"oversized: data has {size} bytes, max_message_bytes is {limit}"


def not_loaded(least: int, limit: int) -> str:
    """Return the reason of a row that a backfill did not load, because its data has at least so many bytes."""
    return f"oversized: data has at least {least} bytes, max_message_bytes is {limit}: the row was not loaded"


def filter_error(error: Exception) -> str:
    """Return the reason of a message that the consumer's filter failed on."""
    return f"{FILTER_ERROR}{error}"


def undecodable(why: str) -> str:
    """Return the reason of a published message that cannot be read."""
    return f"undecodable: {why}"
