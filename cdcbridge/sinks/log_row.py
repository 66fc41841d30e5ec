"""A row of the log as the sinks read it, and the texts that messages have in place of its numbers.

A session reads times and LSNs as the integers that the server sends, because most rows share these values with the row
before, and a text would be made and read for each row. The module never runs a statement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple, Protocol

from psycopg.adapt import AdaptersMap
from psycopg.types.numeric import Int8BinaryLoader

from cdcbridge.lsn import format_lsn

# The columns that a LogRow has, as scan_lane() names them.
COLUMNS: Final = (
    "seq, topic, key, partition, data::text, shown::text, commit_lsn, ordinal, xid, commit_time, inserted_at, old_key"
)
_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)  # PostgreSQL's
_SECOND: Final = 1_000_000  # microseconds


class LogRow(NamedTuple):
    """A message of the log. Times are microseconds since the beginning of the year 2000, as PostgreSQL sends them."""

    seq: int
    topic: str
    key: str | None
    partition: int
    data: str
    shown: str | None
    commit_lsn: int | None
    ordinal: int | None
    xid: int | None
    commit_time: int | None
    inserted_at: int
    old_key: str | None


# LogRow(*row) takes three times as long, and this runs for each message.
log_row: Final[Callable[[Sequence[Any]], LogRow]] = partial(tuple.__new__, LogRow)


class _Adapted(Protocol):
    @property
    def adapters(self) -> AdaptersMap: ...


def read_integers(adapted: _Adapted) -> None:
    """Let a session or a cursor return times and LSNs as integers. Its results must be binary."""
    for name in ("timestamptz", "pg_lsn"):
        adapted.adapters.register_loader(name, Int8BinaryLoader)


@lru_cache(4096)
def lsn_text(lsn: int | None) -> str | None:
    """Return an LSN as text, for example `0/16B3748`."""
    return None if lsn is None else format_lsn(lsn)


@lru_cache(4096)
def time_json(microseconds: int | None) -> str:
    """Return the JSON text that PostgreSQL makes of a time, for example `"2026-05-01T10:00:00.5+00:00"`, or `null`."""
    if microseconds is None:
        return "null"
    seconds, rest = divmod(microseconds, _SECOND)
    fraction = f".{rest:06d}".rstrip("0") if rest else ""
    return f'"{(_EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S")}{fraction}+00:00"'
