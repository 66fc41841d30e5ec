"""Migrate the store's schema to this version, from the files under sql/.

A new store is made from sql/schema.sql. Migrations run once, in order, all in one transaction. Functions and views are
replaced whenever their files changed. The migration waits for no lock for long. It never returns to an
older version, and never touches a schema that is newer than the program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from psycopg import sql

from cdcbridge import __version__
from cdcbridge.database import Connection, store_errors
from cdcbridge.database.patience import patiently
from cdcbridge.database.rights import guest
from cdcbridge.errors import OperatorNeeded
from cdcbridge.schemas import both, internal
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
    for name in both(schema):
        if connection.execute("select to_regnamespace(%s)", (name,)).fetchone() == (None,):
            connection.execute(sql.SQL("create schema {}").format(sql.Identifier(name)))
    create_in(connection, *both(schema))
    before, had, by = _state(connection)
    newest = newest_version()
    if before > newest:
        raise OperatorNeeded(
            f"the store's schema {schema!r} has version {before}, newer than this program's {newest}",
            hint="Install the cdcbridge that made it, or a newer one.",
        )
    create_in(connection, internal(schema), schema)
    if before:
        for version, name, text in sql_files.migrations():
            if version > before:
                connection.execute(text.encode())
                connection.execute("insert into schema_migrations (version, name) values (%s, %s)", (version, name))
    else:
        _make_tables(connection, schema, newest)
    replaced = had != program.checksum and (downgrade or sql_files.release(by) <= sql_files.release(__version__))
    if replaced:
        _install(connection, schema, program)
        connection.execute("select create_segments(), make_code()")
    return Migrated(before, newest, replaced)


def create_in(connection: Connection, first: str, then: str) -> None:
    """Create objects in the first of the store's two schemas, until the transaction ends.

    Functions with `set search_path from current` keep this order. So what an internal function creates is internal.
    """
    path = sql.SQL("set local search_path = {}, {}, pg_temp")
    connection.execute(path.format(sql.Identifier(first), sql.Identifier(then)))


def _make_tables(connection: Connection, schema: str, version: int) -> None:
    connection.execute(sql_files.tables().encode())
    for table in sql_files.PUBLIC_TABLES:
        move = sql.SQL("alter table {} set schema {}")
        connection.execute(move.format(sql.Identifier(table), sql.Identifier(schema)))
    connection.execute("insert into schema_migrations (version, name) values (%s, 'schema')", (version,))


def _install(connection: Connection, schema: str, program: sql_files.Code) -> None:
    """Replace the functions, their comments and rights, the views and the templates.

    The internal schema is first in the search_path before and after the call.
    """
    # Forward references between functions are fine: bodies are checked when they run.
    connection.execute("set local check_function_bodies = off")
    connection.execute("\n".join(program.internal).encode())
    revoke = sql.SQL("revoke execute on all functions in schema {} from public")
    connection.execute(revoke.format(sql.Identifier(internal(schema))))
    create_in(connection, *both(schema))
    connection.execute("\n".join((*(one.text for one in program.public), *program.views)).encode())
    signatures = connection.execute(
        "select p.proname, p.oid::regprocedure::text from pg_proc p"
        " where p.pronamespace = current_schema()::regnamespace"
    ).fetchall()
    public = {one.name: one for one in program.public}
    connection.execute(
        sql.SQL("; ").join(_described(public[name], sql.SQL(text)) for name, text in signatures if name in public)
    )
    create_in(connection, internal(schema), schema)
    connection.execute("delete from code_templates")
    with connection.cursor() as cursor:
        cursor.executemany("insert into code_templates (name, code) values (%s, %s)", program.templates)
    connection.execute(
        "insert into schema_code (checksum, program) values (%s, %s) on conflict (only_row)"
        " do update set checksum = excluded.checksum, program = excluded.program, applied_at = now()",
        (program.checksum, __version__),
    )


def _described(function: sql_files.PublicFunction, signature: sql.SQL) -> sql.Composed:
    """Return the statements that give a function its comment and its rights."""
    right = (
        "revoke execute on function {} from public"
        if function.needs_grant
        else "grant execute on function {} to public"
    )
    comment = sql.SQL("comment on function {} is {}; ").format(signature, sql.Literal(function.header))
    return comment + sql.SQL(right).format(signature)


def schema_version(connection: Connection) -> int:
    """Return the version of the schema on the search_path, or 0 if it contains no store."""
    with store_errors():
        return _state(connection)[0]


# Whether the table is in the schema that applications use. Stores of earlier development versions have it there.
_TABLES: Final = """
    select c.relnamespace = m.relnamespace from pg_class m left join pg_class c on c.oid = to_regclass('consumers')
    where m.oid = to_regclass('schema_migrations')
"""


def _state(connection: Connection) -> tuple[int, str | None, str]:
    who = guest(connection)
    if who is not None:
        raise who.refusal("this command")
    together = connection.execute(_TABLES).fetchone()
    if together is None:
        return 0, None, ""
    if together != (False,):
        raise OperatorNeeded(
            "an earlier development version of cdcbridge made this store, or one of its two schemas was dropped",
            hint="Remove it with the `cdcbridge uninstall` of the version that made it, and begin with a new store"
            " (docs/UPGRADE.md).",
        )
    row = connection.execute("select coalesce(max(version), 0) from schema_migrations").fetchone()
    code = connection.execute("select checksum, program from schema_code").fetchone()
    return (row[0] if row else 0), *(code or (None, ""))
