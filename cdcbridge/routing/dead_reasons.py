"""The reasons of dead letters that a verdict makes, each worded once. Pure.

People search for the words before the colon, for example `cdcbridge dead list billing --reason oversized:`. So these
words must never change. SQL words its own reasons, for example publish() that of a message that is too large.
"""

from __future__ import annotations

from typing import Final

FILTER_ERROR: Final = "filter_error: "


def oversized(size: int, limit: int) -> str:
    """The reason of a message whose `data` has more bytes than the consumer's max_message_bytes."""
    return f"oversized: data has {size} bytes, max_message_bytes is {limit}"


def not_loaded(least: int, limit: int) -> str:
    """The same of a row that a backfill did not load, because it has at least so many bytes."""
    return f"oversized: data has at least {least} bytes, max_message_bytes is {limit}: the row was not loaded"


def filter_error(error: Exception) -> str:
    """The reason of a message that the consumer's filter failed on."""
    return f"{FILTER_ERROR}{error}"


def undecodable(why: str) -> str:
    """The reason of a published message that cannot be read."""
    return f"undecodable: {why}"
