"""Ask the source about its tables: their keys and columns, and single values that a change in the log lacks.

Never changes anything, and never reads more than one row of a table at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from psycopg import sql

from cdcbridge.changes.keys import key_columns
from cdcbridge.database import connect_source, source_errors
from cdcbridge.errors import OperatorNeeded
from cdcbridge.mirrors.changes import columns_of
from cdcbridge.mirrors.tables import named

_COLUMNS: Final = """
    select a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity <> '',
           case when a.attgenerated <> '' then pg_get_expr(d.adbin, d.adrelid) end,
           case when a.attgenerated = '' then pg_get_expr(d.adbin, d.adrelid) end
    from pg_attribute a left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
    where a.attrelid = %s::regclass and a.attnum > 0 and not a.attisdropped order by a.attnum
"""
_KEYS: Final = """
    select (select array_agg(a.attname order by u.n) from pg_index i
            cross join unnest(i.indkey::int2[]) with ordinality u (attnum, n)
            join pg_attribute a on a.attrelid = i.indrelid and a.attnum = u.attnum
            where i.indrelid = c.oid and i.indisprimary),
           (select array_agg(a.attname order by u.n) from pg_index i
            cross join unnest(i.indkey::int2[]) with ordinality u (attnum, n)
            join pg_attribute a on a.attrelid = i.indrelid and a.attnum = u.attnum
            where i.indrelid = c.oid and i.indisreplident),
           c.relreplident = 'f'
    from pg_class c where c.oid = to_regclass(%s)
"""
# The parts of a table that a mirror does not create.
_LEFT_OUT: Final = """
    select array_remove(array[
        case when exists (select from pg_constraint k where k.conrelid = c.oid and k.contype = 'f')
             then 'foreign keys' end,
        case when exists (select from pg_constraint k where k.conrelid = c.oid and k.contype = 'c')
             then 'check constraints' end,
        case when exists (select from pg_index i where i.indrelid = c.oid and not i.indisprimary) then 'indexes' end,
        case when exists (select from pg_trigger t where t.tgrelid = c.oid and not t.tgisinternal) then 'triggers' end,
        case when c.relkind = 'p' then 'partitions' end], null)
    from pg_class c where c.oid = to_regclass(%s)
"""


@dataclass(slots=True, frozen=True)
class SourceColumn:
    """A column of a table in the source.

    Attributes:
        type: The type as SQL.
        not_null: Whether it takes no null.
        identity: Whether it is an identity column.
        expression: The expression of a generated column, or None.
        default: The default as SQL, or None.
    """

    name: str
    type: str
    not_null: bool
    identity: bool
    expression: str | None
    default: str | None


class SourceTables:
    """A session on the source that reads catalogues and single rows.

    Args:
        dsn: The DSN of the source.
    """

    def __init__(self, dsn: str) -> None:
        self._connection = connect_source(dsn, "cdcbridge mirror", reads=True)
        with source_errors():  # so that types and defaults come with the names of their schemas
            self._connection.execute("set search_path = ''")

    def close(self) -> None:
        self._connection.close()

    def key(self, topic: str) -> tuple[str, ...]:
        """Return the columns of the log's key of a table. Empty if it has none.

        Raises:
            OperatorNeeded: The source has no such table any more.
        """
        with source_errors():
            row = self._connection.execute(_KEYS, (quoted(topic),)).fetchone()
        if row is None:
            raise OperatorNeeded(
                f"source: the table {topic} does not exist any more, and the log has changes of it",
                hint=f'Leave it out of the mirror with "!{topic}" in `tables`.',
            )
        return key_columns(row[0] or (), row[1] or (), full=row[2]) or ()

    def columns(self, topic: str) -> list[SourceColumn]:
        """Return the columns of a table, in their order."""
        with source_errors():
            return [SourceColumn(*row) for row in self._connection.execute(_COLUMNS, (quoted(topic),)).fetchall()]

    def left_out(self, topic: str) -> list[str]:
        """Return the parts of a table, in words, that a mirror does not create."""
        with source_errors():
            row = self._connection.execute(_LEFT_OUT, (quoted(topic),)).fetchone()
        return list(row[0]) if row else []

    def row(self, topic: str, key: Sequence[str], identity: str, columns: Sequence[str]) -> str | None:
        """Return some columns of one row as it is now, as JSON text, or None if the row is gone.

        Args:
            topic: The table.
            key: The columns of its key.
            identity: A JSON object that has these columns.
            columns: The wanted columns.
        """
        schema, _, name = topic.partition(".")
        table = named(schema, name)
        query = sql.SQL(
            "select row_to_json(x.*)::text from (select {} from {} t,"
            " json_populate_record(null::{}, %s::json) k where {}) x"
        ).format(
            sql.SQL(", ").join(named("t", column) for column in columns),
            table,
            table,
            sql.SQL(" and ").join(sql.SQL("t.{0} = k.{0}").format(named(column)) for column in key),
        )
        with source_errors():
            row = self._connection.execute(query, (identity,)).fetchone()
        return row[0] if row else None

    def written_at(self, topic: str, key: Sequence[str], record: str) -> int | None:
        """Return when a row was committed, in microseconds since 2000-01-01 UTC, or 0 if that is not known.

        Args:
            topic: The table.
            key: The columns of its key.
            record: The row as JSON text.

        Returns:
            None if the row is not the same any more.
        """
        schema, _, name = topic.partition(".")
        table = named(schema, name)
        columns = columns_of(record)
        query = sql.SQL(
            "select coalesce((extract(epoch from pg_xact_commit_timestamp(t.xmin)) * 1000000)::bigint"
            " - 946684800000000, 0) from {} t, json_populate_record(null::{}, %s::json) k where {}"
            " and (select row_to_json(x.*)::text from (select {}) x)"
            " = (select row_to_json(x.*)::text from (select {}) x)"
        ).format(
            table,
            table,
            sql.SQL(" and ").join(sql.SQL("t.{0} = k.{0}").format(named(column)) for column in key),
            sql.SQL(", ").join(named("t", column) for column in columns),
            sql.SQL(", ").join(named("k", column) for column in columns),
        )
        with source_errors():
            row = self._connection.execute(query, (record,)).fetchone()
        return row[0] if row else None


def quoted(topic: str) -> str:
    """Return a table's name for to_regclass(): `public.orders` becomes `"public"."orders"`."""
    schema, _, name = topic.partition(".")
    return sql.Identifier(schema, name).as_string(None)
