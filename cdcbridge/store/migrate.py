"""Migrate the store's schema to this version, from the files under sql/.

A new store is made from sql/schema.sql. Migrations run once, in order, all in one transaction. Functions and views are
replaced whenever their files changed. The migration waits for no lock for long. It never returns to an
older version, and never touches a schema that is newer than the program.
"""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import sql

from cdcbridge import __version__
from cdcbridge.database import Connection, store_errors
from cdcbridge.database.patience import patiently
from cdcbridge.database.rights import guest
from cdcbridge.errors import OperatorNeeded
from cdcbridge.store import sql_files

_LOCK = 0x63646362  # "cdcb": the advisory lock that permits one migration at a time in a database


@dataclass(slots=True, frozen=True)
class Migrated:
    """The result of migrate(): the versions before and after, and whether functions and views were replaced."""

    before: int
    after: int
    code_replaced: bool


def newest_version() -> int:
    """Return the version of the tables that this program makes."""
    return max((version for version, _, _ in sql_files.migrations()), default=1)


def migrate(connection: Connection, schema: str, patience: float | None = None, *, downgrade: bool = False) -> Migrated:
    """Migrate the schema to this version.

    Args:
        connection: A session on the store.
        schema: The name of the schema, which is created if it does not exist.
        patience: Seconds to wait for locks that other sessions hold. None stands for the usual 30 s.
        downgrade: Whether to replace the functions of a newer program, too. A bridge does not: in a rolling restart an
            old bridge would put its functions in the place of the new ones.

    Raises:
        OperatorNeeded: The schema is newer than the program.
        LockedOut: Another session held a lock for longer than `patience`.
    """
    program = sql_files.code()
    with store_errors():
        return patiently(
            connection,
            lambda: _migrate(connection, schema, program, downgrade=downgrade),
            what=f"the migration of the schema {schema}",
            again="cdcbridge migrate",
            patience=patience,
        )


def _migrate(connection: Connection, schema: str, program: sql_files.Code, *, downgrade: bool) -> Migrated:
    connection.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))
    if connection.execute("select to_regnamespace(%s)", (schema,)).fetchone() == (None,):
        connection.execute(sql.SQL("create schema {}").format(sql.Identifier(schema)))
    connection.execute(sql.SQL("set local search_path = {}, pg_temp").format(sql.Identifier(schema)))
    before, had, by = _state(connection)
    newest = newest_version()
    if before > newest:
        raise OperatorNeeded(
            f"the store's schema {schema!r} has version {before}, newer than this program's {newest}",
            hint="Install the cdcbridge that made it, or a newer one.",
        )
    wanted = (
        [step for step in sql_files.migrations() if step[0] > before]
        if before
        else [(newest, "schema", sql_files.tables())]
    )
    for version, name, text in wanted:
        connection.execute(text.encode())
        connection.execute("insert into schema_migrations (version, name) values (%s, %s)", (version, name))
    replaced = had != program.checksum and (downgrade or sql_files.release(by) <= sql_files.release(__version__))
    if replaced:
        _install(connection, program)
        connection.execute("select create_segments(), make_code(), restrict_rights()")
    return Migrated(before, newest, replaced)


def _install(connection: Connection, program: sql_files.Code) -> None:
    """Replace the functions, their comments, the views and the templates."""
    # Forward references between functions are fine: bodies are checked when they run.
    connection.execute("set local check_function_bodies = off")
    for text in (*(one.text for one in program.public), *program.internal):
        connection.execute(text.encode())
    signatures = (
        "select p.oid::regprocedure::text from pg_proc p"
        " where p.pronamespace = current_schema()::regnamespace and p.proname = %s"
    )
    for one in program.public:
        for (signature,) in connection.execute(signatures, (one.name,)).fetchall():
            comment = sql.SQL("comment on function {} is {}").format(sql.SQL(signature), sql.Literal(one.header))
            connection.execute(comment)
    connection.execute("delete from code_templates")
    with connection.cursor() as cursor:
        cursor.executemany("insert into code_templates (name, code) values (%s, %s)", program.templates)
    connection.execute(
        "insert into schema_code (checksum, program) values (%s, %s) on conflict (only_row)"
        " do update set checksum = excluded.checksum, program = excluded.program, applied_at = now()",
        (program.checksum, __version__),
    )


def schema_version(connection: Connection) -> int:
    """Return the version of the schema on the search_path, or 0 if it contains no store."""
    with store_errors():
        return _state(connection)[0]


def _state(connection: Connection) -> tuple[int, str | None, str]:
    if connection.execute("select to_regclass('schema_migrations')").fetchone() == (None,):
        return 0, None, ""
    who = guest(connection)
    if who is not None:
        raise who.refusal("this command")
    row = connection.execute("select coalesce(max(version), 0) from schema_migrations").fetchone()
    code = connection.execute("select checksum, program from schema_code").fetchone()
    return (row[0] if row else 0), *(code or (None, ""))
