"""Open sessions on the store for callers of its SQL functions, also through a connection pooler.

PgBouncer gives each transaction another session of the server, and other applications use that session, too. Each
statement is therefore a transaction that sets the settings on which it depends. The Python clients do the same. Never
changes a setting of a server's session for longer than a transaction, and never uses LISTEN.
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
    """A connection that also works through a pooler.

    execute() and transaction() are always safe. cursor() is safe only in a transaction.
    """

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
    """Open a session for calls of the store's SQL functions, directly or through a pooler.

    The session does nothing that a pooler cannot do.

    Args:
        dsn: The DSN of the store, which may lead to a pooler.
        schema: The schema of the store.
        application_name: The name of the session in pg_stat_activity.

    Raises:
        StoreUnavailable: The store cannot be reached.
        OperatorNeeded: The role has no rights on the schema.
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
        connection.prepare_threshold = None  # the next transaction may run in another session
        refuse_without_usage(connection, schema)
        return connection
