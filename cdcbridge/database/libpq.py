"""Run prepared statements by libpq alone, which waits for the server without the interpreter's lock.

psycopg would take that lock for each 8 kB of an answer. For a large answer that is half of the time of a row. The
caller's thread waits in these functions without a limit. Never opens a session.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import psycopg
from psycopg.adapt import Transformer
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGconn, PGresult
from psycopg.rows import RowMaker

_Row = TypeVar("_Row")


def prepare(session: PGconn, name: bytes, statement: str) -> None:
    """Prepare a statement, whose parameters are $1, $2 and so on."""
    done(session.prepare(name, statement.encode()))


def rows(make: RowMaker[_Row], session: psycopg.Connection[Any], prepared: bytes, *values: Any) -> list[_Row]:
    """Run a prepared statement, and return its rows.

    Args:
        make: Makes a row of its values.
        session: The session, which no other thread uses meanwhile.
        prepared: The name of the statement.
        *values: The parameters, as texts or values whose text the server reads.
    """
    given = [None if value is None else str(value).encode() for value in values]
    result = done(session.pgconn.exec_prepared(prepared, cast("Sequence[bytes]", given), result_format=Format.BINARY))
    transformer = Transformer(session)
    transformer.set_pgresult(result)
    return transformer.load_rows(0, result.ntuples, make)


@contextlib.contextmanager
def transaction(session: PGconn) -> Iterator[None]:
    """Run a transaction. After a rollback by psycopg, the session would have no prepared statements any more."""
    done(session.exec_(b"begin"))
    try:
        yield
    except BaseException:
        session.exec_(b"rollback")  # on a lost connection, a result that is not looked at
        raise
    done(session.exec_(b"commit"))


def done(result: PGresult) -> PGresult:
    """Return the result of a statement, unless it is an error."""
    if result.status not in (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK):
        raise error_from_result(result)
    return result
