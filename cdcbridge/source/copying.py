"""Read a table with COPY, up to a limit of bytes."""

from __future__ import annotations

import select
from typing import Final

from psycopg import errors, pq, sql

from cdcbridge.database import Connection
from cdcbridge.routing.copy_format import COPY_HEADER, ROW_HEAD
from cdcbridge.source.shapes import ReadShape

_SAVEPOINT: Final = b"savepoint copying"
_ROLLBACK: Final = b"rollback to savepoint copying"
_RELEASE: Final = b"release savepoint copying"


def copy_rows(connection: Connection, query: sql.Composed, most_bytes: int | None) -> tuple[list[bytes], bool]:
    """Return the rows of a COPY in binary format, each without its leading number of fields.

    If the rows exceed `most_bytes`, the COPY is cancelled, and only the rows up to that limit are returned. A savepoint
    keeps the transaction and its snapshot.

    Args:
        connection: A session in a transaction.
        query: The COPY statement.
        most_bytes: The limit in bytes, or None for no limit. At least one row is returned, even a larger one.

    Returns:
        The rows, and whether these are all rows.
    """
    if most_bytes is not None:
        connection.execute(_SAVEPOINT)
    pgconn = connection.pgconn
    result = pgconn.exec_params(query.as_bytes(connection), None)  # one statement only, even if a condition has several
    if result.status != pq.ExecStatus.COPY_OUT:
        raise errors.error_from_result(result)
    rows, whole = _taken(pgconn, most_bytes)
    if not whole:
        connection.cancel()
        _taken(pgconn, 0)
    while (ended := pgconn.get_result()) is not None:
        if ended.status == pq.ExecStatus.FATAL_ERROR and (whole or not _is_cancel(ended)):
            raise errors.error_from_result(ended)
    if most_bytes is not None:
        connection.execute(_RELEASE if whole else _ROLLBACK)
    return rows, whole


def _taken(pgconn: pq.abc.PGconn, most_bytes: int | None) -> tuple[list[bytes], bool]:
    """Return rows up to `most_bytes`, at least one, and whether no further rows follow.

    With a limit of 0 bytes, read to the end and return no rows.
    """
    rows: list[bytes] = []
    get = pgconn.get_copy_data
    wait = select.poll()  # select() fails in a process with more than 1,024 open files
    wait.register(pgconn.socket, select.POLLIN)
    size, skipped = 0, ROW_HEAD + len(COPY_HEADER)  # the header is in the first row's message
    while True:
        length, data = get(1)
        if length > skipped:  # otherwise it is the trailer, in one message with the header if there are no rows
            size += length
            if most_bytes is not None and rows and size > most_bytes:
                return rows, False
            if most_bytes != 0:
                rows.append(bytes(data[skipped:]))
                skipped = ROW_HEAD
        elif length == 0:
            wait.poll()
            pgconn.consume_input()
        elif length < 0:
            return rows, True


def _is_cancel(result: pq.abc.PGresult) -> bool:
    return result.error_field(pq.DiagnosticField.SQLSTATE) == b"57014"


def try_condition(connection: Connection, shape: ReadShape, condition: str | None) -> None:
    """Raise psycopg.Error if the table cannot be read with this condition."""
    query = sql.SQL("select * from {} where ({}) limit 0").format(shape.rows, sql.SQL(condition or "true"))
    result = connection.pgconn.exec_params(query.as_bytes(connection), None)  # one statement only
    if result.status != pq.ExecStatus.TUPLES_OK:
        raise errors.error_from_result(result)
