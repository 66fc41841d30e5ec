"""Find the tables of the target, create those that are missing, and check that they can take the source's rows.

Never changes a table that exists.
"""

from __future__ import annotations

from typing import Final

import structlog
from psycopg import sql

from cdcbridge.config import Mirror
from cdcbridge.config.mirror import CreateTables
from cdcbridge.database import Connection, target_errors
from cdcbridge.errors import OperatorNeeded
from cdcbridge.mirrors.source_tables import SourceColumn, SourceTables, quoted
from cdcbridge.mirrors.tables import COMMA, HISTORY, TargetColumn, TargetTable

_COLUMNS: Final = """
    select a.attname, format_type(a.atttypid, -1), b.typtype = 'c',
           case when e.typtype = 'c' then format_type(e.oid, null) end, a.attgenerated <> ''
    from pg_attribute a
    join pg_type t on t.oid = a.atttypid
    join pg_type b on b.oid = case when t.typtype = 'd' then t.typbasetype else t.oid end
    left join pg_type e on e.oid = b.typelem and b.typcategory = 'A'
    where a.attrelid = to_regclass(%s) and a.attnum > 0 and not a.attisdropped order by a.attnum
"""
# Whether the key's columns are those of a unique index that can arbitrate: complete, immediate and of plain columns.
_UNIQUE: Final = """
    select exists (
        select from pg_index i
        where i.indrelid = to_regclass(%s) and i.indisunique and i.indimmediate and i.indpred is null and i.indisvalid
          and (select array_agg(a.attname::text order by a.attname)
               from unnest(i.indkey::int2[]) with ordinality u (attnum, n)
               join pg_attribute a on a.attrelid = i.indrelid and a.attnum = u.attnum
               where u.n <= i.indnkeyatts) = (select array_agg(k order by k) from unnest(%s::text[]) k))
"""
log = structlog.get_logger()


class TargetTables:
    """The tables that a mirror applies to, each looked at once.

    Args:
        mirror: The settings.
        source: Answers questions about the source's tables.
        connection: The mirror's session on the target, outside of a transaction or inside.
    """

    def __init__(self, mirror: Mirror, source: SourceTables, connection: Connection) -> None:
        self._mirror = mirror
        self._source = source
        self._connection = connection
        self._found: dict[str, TargetTable] = {}

    def get(self, topic: str) -> TargetTable:
        """Return the target's table for a topic, and create it if it is missing and the mirror may do so.

        Raises:
            OperatorNeeded: There is no such table, or it cannot take the rows.
        """
        found = self._found.get(topic)
        if found is None:
            found = self._found[topic] = self._look(topic)
        return found

    def only(self, topic: str) -> sql.Composable:
        """Return the table's name for TRUNCATE: with ONLY, which a partitioned table does not allow."""
        table = self.get(topic)
        row = self._connection.execute(
            "select relkind = 'p' from pg_class where oid = to_regclass(%s)", (quoted(table.full_name),)
        ).fetchone()
        return table.identifier if row and row[0] else sql.SQL("only {}").format(table.identifier)

    def forget(self) -> None:
        """Look at the tables again, because they may have changed."""
        self._found.clear()

    def described(self, topic: str) -> TargetTable:
        """Return the target's table for a topic as it is. It has no columns if there is no such table."""
        route = self._mirror.route(topic)
        schema, _, name = (route.to or topic).partition(".")
        table = TargetTable(topic, schema, name, {}, self._source.key(topic), route)
        self.refresh(table)
        return table

    def _look(self, topic: str) -> TargetTable:
        table = self.described(topic)
        if not table.columns:
            self._create(table)
            self.refresh(table)
        if table.key and self._mirror.apply == "upsert":
            self.require_key(table)
        return table

    def refresh(self, table: TargetTable) -> None:
        """Look at the table's columns, and write its statements anew."""
        with target_errors():
            table.columns = read_columns(self._connection, table.full_name)
        table.statements.clear()

    def require_key(self, table: TargetTable) -> None:
        """Raise OperatorNeeded if the table has no unique index on the key."""
        name = table.full_name
        with target_errors():
            row = self._connection.execute(_UNIQUE, (quoted(name), list(table.key))).fetchone()
        if row is None or not row[0]:
            key = COMMA.join(map(sql.Identifier, table.key)).as_string(None)
            raise OperatorNeeded(
                f"target: the table {name} has no primary key or unique index on ({key}), the key of {table.topic}",
                hint=f"In the target: alter table {quoted(name)} add primary key ({key});",
            )

    # creating a table

    def _create(self, table: TargetTable) -> None:
        name = table.full_name
        if self._mirror.create_tables is False:
            raise OperatorNeeded(
                f"target: there is no table {name} for the changes of {table.topic}",
                hint="Create it, or let the mirror do so with create_tables: true.",
            )
        statement = self.definition(table)
        with target_errors():
            if self._connection.execute("select to_regnamespace(quote_ident(%s))", (table.schema,)).fetchone() == (
                None,
            ):
                self._connection.execute(sql.SQL("create schema {}").format(sql.Identifier(table.schema)))
            self._connection.execute(statement)
        left_out = self._source.left_out(table.topic)
        columns = self._columns(table)
        if not self._with_defaults and any(one.default is not None or one.identity for one in columns):
            left_out.append("defaults")
        log.info("mirror.table_created", mirror=self._mirror.name, table=name, left_out=left_out)

    @property
    def _with_defaults(self) -> bool:
        options = self._mirror.create_tables
        return isinstance(options, CreateTables) and options.defaults

    def _columns(self, table: TargetTable) -> list[SourceColumn]:
        return [one for one in self._source.columns(table.topic) if one.name in table.mirrored([one.name])]

    def definition(self, table: TargetTable) -> sql.Composed:
        """Return the statement that creates a table for the source's rows."""
        columns = self._columns(table)
        parts: list[sql.Composable] = []
        history = self._mirror.apply == "append"
        if history:
            clash = sorted({name for name, _ in HISTORY} & {one.name for one in columns})
            if clash:
                raise OperatorNeeded(
                    f"the history of {table.topic} has the columns op, position and commit_time, and the table itself"
                    f" has {', '.join(clash)}",
                    hint=f"Leave that column out: {{{table.topic}: {{columns: {{exclude: [{clash[0]}]}}}}}}.",
                )
            parts += [
                sql.SQL("{} {}{}").format(
                    sql.Identifier(name), sql.SQL(kind), sql.SQL("" if name == "commit_time" else " not null")
                )
                for name, kind in HISTORY
            ]
        parts += [_column(one, history=history, defaults=self._with_defaults) for one in columns]
        if history:
            parts.append(sql.SQL("primary key (position)"))
        elif table.key:
            parts.append(sql.SQL("primary key ({})").format(COMMA.join(map(sql.Identifier, table.key))))
        return sql.SQL("create table {} ({})").format(table.identifier, COMMA.join(parts))


def read_columns(connection: Connection, table: str) -> dict[str, TargetColumn]:
    """Return the columns of a table by name. Empty if there is no such table."""
    rows = connection.execute(_COLUMNS, (quoted(table),)).fetchall()
    return {name: TargetColumn(*rest) for name, *rest in rows}


def _column(column: SourceColumn, *, history: bool, defaults: bool) -> sql.Composed:
    extras: list[sql.Composable] = []
    if not history:
        if column.expression is not None:
            extras.append(sql.SQL("generated always as ({}) stored").format(sql.SQL(column.expression)))
        elif defaults and column.identity:
            extras.append(sql.SQL("generated by default as identity"))
        elif defaults and column.default is not None and "nextval(" not in column.default:
            extras.append(sql.SQL("default {}").format(sql.SQL(column.default)))
        if column.not_null:
            extras.append(sql.SQL("not null"))
    return sql.SQL(" ").join([sql.Identifier(column.name), sql.SQL(column.type), *extras])
