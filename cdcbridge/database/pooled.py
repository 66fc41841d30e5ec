"""Sessions on the store for callers of its SQL functions, also through a connection pooler. Part of the rim.

PgBouncer gives each transaction another session of the server, which other applications use as well. So each statement
is a transaction that sets what it depends on for itself, as the Python clients do. Never changes a setting of a
server's session, and never listens in one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.abc import Params
from psycopg.pq import TransactionStatus

from cdcbridge.database import Connection, connect_store, conninfo, refuse_without_usage, search_path, store_errors
from cdcbridge.database.session import pin_locally
from cdcbridge.errors import BehindPooler


class PooledConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection through a pooler; execute() and transaction() are safe there, cursor() is so in a transaction."""

    settings: sql.Composed

    def execute(
        self, query: Any, params: Params | None = None, *, prepare: bool | None = None, binary: bool = False
    ) -> psycopg.Cursor[tuple[Any, ...]]:
        if self.info.transaction_status != TransactionStatus.IDLE:
            return super().execute(query, params, prepare=prepare, binary=binary)
        with self.transaction():
            return super().execute(query, params, prepare=prepare, binary=binary)

    @contextmanager
    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> Iterator[psycopg.Transaction]:
        outermost = self.info.transaction_status == TransactionStatus.IDLE
        with super().transaction(savepoint_name, force_rollback) as transaction:
            if outermost:
                super().execute(self.settings)
            yield transaction


def connect_for_calls(dsn: str, schema: str, application_name: str) -> Connection:
    """Open a session that calls SQL functions of the store, and does nothing that a pooler cannot do.

    Raises StoreUnavailable, or OperatorNeeded where the role has no rights on the schema.
    """
    try:
        return connect_store(dsn, schema, application_name)
    except BehindPooler:
        return _connect(dsn, schema, application_name)


def _connect(dsn: str, schema: str, application_name: str) -> Connection:
    with store_errors():
        connection = PooledConnection.connect(conninfo(dsn, application_name, pooler=True), autocommit=True)
        connection.settings = pin_locally({"search_path": search_path(schema)})
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        connection.read_only = False
        connection.prepare_threshold = None  # the next transaction may be another session's
        refuse_without_usage(connection, schema)
        return connection
