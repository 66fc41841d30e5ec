"""Describe a table of the target, and write the SQL that applies changes to it.

The rows reach the server as one JSON text for each statement, which json_to_recordset() turns into values. A type that
this function does not build from JSON, such as a composite type, is read as text and then cast. This module never
runs a statement.

Source: PostgreSQL manual, "JSON Functions and Operators", "INSERT" and "Replication Progress Tracking".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from psycopg import sql

from cdcbridge.config.mirror import MirrorTable

COMMA: Final = sql.SQL(", ")
_AND: Final = sql.SQL(" and ")
# The columns of a history table, before those of the source's table.
HISTORY: Final = (("op", "text"), ("position", "text"), ("commit_time", "timestamptz"))


@dataclass(slots=True, frozen=True)
class TargetColumn:
    """A column of a table in the target.

    Attributes:
        type: The type as SQL, for example `character varying(20)`.
        as_text: Whether its values are read as text and then cast.
        elements: The type of the elements of an array of composite values, whose elements are read as texts. None: it
            is no such array.
        generated: Whether the server computes its values.
    """

    type: str
    as_text: bool
    elements: str | None
    generated: bool

    @property
    def read_as(self) -> str:
        """The type with which json_to_recordset() reads it."""
        return "json" if self.elements else "text" if self.as_text else self.type


@dataclass(slots=True)
class TargetTable:
    """A table of the target, to which the changes of one topic are applied.

    Attributes:
        topic: The table in the source, for example public.orders.
        schema: The schema in the target.
        name: The name in the target.
        columns: The columns in the target, by name.
        key: The columns of the source's key. Empty: the table has none.
        route: The settings of the mirror for this table.
        statements: The statements that were written before, by their name and columns.
    """

    topic: str
    schema: str
    name: str
    columns: dict[str, TargetColumn]
    key: tuple[str, ...]
    route: MirrorTable
    statements: dict[tuple[str, tuple[str, ...]], sql.Composed] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """The name for people, for example reporting.orders."""
        return f"{self.schema}.{self.name}"

    @property
    def identifier(self) -> sql.Composable:
        """The name for a statement without parameters."""
        return sql.Identifier(self.schema, self.name)

    @property
    def named(self) -> sql.Composable:
        """The name for a statement with parameters."""
        return named(self.schema, self.name)

    def mirrored(self, columns: Iterable[str]) -> tuple[str, ...]:
        """Return those of the source's columns that this mirror applies."""
        chosen = self.route.columns
        if chosen is None:
            return tuple(columns)
        if chosen.include is not None:
            return tuple(c for c in columns if c in chosen.include or c in self.key)
        return tuple(c for c in columns if c not in (chosen.exclude or ()))

    def lacking(self, columns: Iterable[str]) -> tuple[str, ...]:
        """Return the columns that the source's rows have, that are mirrored, and that the target lacks."""
        return tuple(name for name in self.mirrored(columns) if name not in self.columns)

    def written(self, columns: Iterable[str]) -> tuple[str, ...]:
        """Return the columns that a statement writes. The target computes generated ones itself."""
        return tuple(name for name in self.mirrored(columns) if not self.columns[name].generated)

    def rows(self, columns: Sequence[str], alias: str = "r") -> sql.Composed:
        """Return a FROM item that makes rows of the JSON array in the parameter, with these columns."""
        given = [sql.SQL("{} {}").format(named(name), typed(self.columns[name].read_as)) for name in columns]
        return sql.SQL("json_to_recordset(%s) as {} ({})").format(named(alias), COMMA.join(given))

    def value(self, column: str, alias: str = "r") -> sql.Composable:
        """Return the value of a column in the FROM item of rows()."""
        value = named(alias, column)
        known = self.columns[column]
        if known.elements:
            return sql.SQL(
                "case when {0} is not null then array(select x::{1} from json_array_elements_text({0}) x)::{2} end"
            ).format(value, typed(known.elements), typed(known.type))
        return sql.SQL("{}::{}").format(value, typed(known.type)) if known.as_text else value

    def matches(self, alias: str = "r") -> sql.Composed:
        """Return the condition that a row `t` of the table has the key of a row of rows()."""
        return _AND.join(sql.SQL("t.{} = {}").format(named(name), self.value(name, alias)) for name in self.key)

    def values(self, columns: Sequence[str]) -> sql.Composed:
        return COMMA.join(self.value(name) for name in columns)

    def statement(self, name: str, columns: tuple[str, ...]) -> sql.Composed:
        """Return a statement by the name of its function in this module, written once for each list of columns."""
        found = self.statements.get((name, columns))
        if found is None:
            found = self.statements[name, columns] = _STATEMENTS[name](self, columns)
        return found


def named(*parts: str) -> sql.Composable:
    """Return a name for a statement with parameters, in which psycopg takes a percent sign for a placeholder."""
    return typed(sql.Identifier(*parts).as_string(None))


def typed(text: str) -> sql.Composable:
    """Return SQL such as the name of a type, for a statement with parameters."""
    return sql.SQL(text.replace("%", "%%"))


def _names(columns: Iterable[str]) -> sql.Composed:
    return COMMA.join(map(named, columns))


def _insert(table: TargetTable, columns: tuple[str, ...]) -> sql.Composed:
    return sql.SQL("insert into {} ({}) overriding system value select {} from {}").format(
        table.named, _names(columns), table.values(columns), table.rows(columns)
    )


def _upsert(table: TargetTable, columns: tuple[str, ...]) -> sql.Composed:
    others = [name for name in columns if name not in table.key]
    change = COMMA.join(sql.SQL("{0} = excluded.{0}").format(named(name)) for name in others)
    action = sql.SQL("do update set {}").format(change) if others else sql.SQL("do nothing")
    return sql.SQL("{} on conflict ({}) {}").format(_insert(table, columns), _names(table.key), action)


def _update(table: TargetTable, columns: tuple[str, ...]) -> sql.Composed:
    # A row with nothing but its key is written as well, so that its last writer is the mirror.
    others = [name for name in columns if name not in table.key] or list(table.key[:1])
    return sql.SQL("update {} t set {} from {} where {}").format(
        table.named,
        COMMA.join(sql.SQL("{} = {}").format(named(name), table.value(name)) for name in others),
        table.rows(columns),
        table.matches(),
    )


def _delete(table: TargetTable, _columns: tuple[str, ...]) -> sql.Composed:
    return sql.SQL("delete from {} t using {} where {}").format(table.named, table.rows(table.key), table.matches())


# Whether this mirror wrote the row last: in an earlier transaction, or in this one, whose commit has no time yet.
_MIRRORED: Final = (
    "coalesce((pg_xact_commit_timestamp_origin(t.xmin)).roident = current_setting('cdcbridge.origin')::oid,"
    " age(t.xmin) <= age(pg_current_xact_id()::xid))"
)


def _update_mirrored(table: TargetTable, columns: tuple[str, ...]) -> sql.Composed:
    return sql.SQL("{} and {}").format(_update(table, columns), sql.SQL(_MIRRORED))


def _delete_mirrored(table: TargetTable, columns: tuple[str, ...]) -> sql.Composed:
    return sql.SQL("{} and {}").format(_delete(table, columns), sql.SQL(_MIRRORED))


def _rekey(table: TargetTable, columns: tuple[str, ...]) -> sql.Composed:
    """Change the key of one row. The first parameter has the new row, and the second one the old key."""
    return sql.SQL("update {} t set {} from {}, {} where {}").format(
        table.named,
        COMMA.join(sql.SQL("{} = {}").format(named(name), table.value(name)) for name in columns),
        table.rows(columns),
        table.rows(table.key, "o"),
        table.matches("o"),
    )


def _lock(table: TargetTable, columns: tuple[str, ...]) -> sql.Composed:
    """Lock the rows with these keys in the order of the keys, and return what decide() needs of them.

    Each row of the result has the ordinal of the key in the parameter, from 1 on, the target's row, and whether this
    mirror wrote the row last.
    """
    return sql.SQL(
        'select r."#", row_to_json(t.*)::text, {mirrored},'
        " (extract(epoch from (pg_xact_commit_timestamp_origin(t.xmin)).timestamp) * 1000000)::bigint - 946684800000000"
        ' from {table} t, (select row_number() over () as "#", {values} from {rows}) r where {matches}'
        " order by {order} for update of t"
    ).format(mirrored=sql.SQL(_MIRRORED), **_parts(table, columns))


def _parts(table: TargetTable, columns: tuple[str, ...]) -> dict[str, sql.Composable]:
    """Return the parts that the statements which look up rows by the keys in their parameter share."""
    return {
        "table": table.named,
        "values": COMMA.join(sql.SQL("{} as {}").format(table.value(name), named(name)) for name in columns),
        "rows": table.rows(columns),
        "matches": _AND.join(sql.SQL("t.{0} = r.{0}").format(named(name)) for name in table.key),
        "order": COMMA.join(sql.SQL("t.{}").format(named(name)) for name in table.key),
    }


def _present(table: TargetTable, columns: tuple[str, ...]) -> sql.Composed:
    """Lock the rows as _lock() does, on a server that does not know who wrote a row last."""
    return sql.SQL(
        'select r."#", row_to_json(t.*)::text, false, null::bigint'
        ' from {table} t, (select row_number() over () as "#", {values} from {rows}) r where {matches}'
        " order by {order} for update of t"
    ).format(**_parts(table, columns))


def _delete_others(table: TargetTable, _columns: tuple[str, ...]) -> sql.Composed:
    """Delete all rows but those with a key in the parameter."""
    return sql.SQL("delete from {} t where not exists (select from {} where {})").format(
        table.named, table.rows(table.key), table.matches()
    )


def _equal(table: TargetTable, columns: tuple[str, ...]) -> sql.Composed:
    """Return the ordinals, from 1 on, of the rows in the parameter that the target has exactly so."""
    return sql.SQL(
        'select r."#" from {table} t, (select row_number() over () as "#", {values} from {rows}) r where {matches}'
        " and (select row_to_json(x.*)::text from (select {mine}) x)"
        " = (select row_to_json(x.*)::text from (select {its}) x)"
    ).format(
        **_parts(table, columns),
        mine=COMMA.join(sql.SQL("t.{}").format(named(name)) for name in columns),
        its=COMMA.join(sql.SQL("r.{}").format(named(name)) for name in columns),
    )


def _append(table: TargetTable, columns: tuple[str, ...]) -> sql.Composed:
    """Append rows to a history table. The parameter's objects also have op, position and commit_time."""
    names = (*(name for name, _ in HISTORY), *columns)
    return sql.SQL("insert into {} ({}) overriding system value select {} from {}").format(
        table.named, _names(names), table.values(names), table.rows(names)
    )


_STATEMENTS: Final = {
    "insert": _insert,
    "upsert": _upsert,
    "update": _update,
    "delete": _delete,
    "update_mirrored": _update_mirrored,
    "delete_mirrored": _delete_mirrored,
    "rekey": _rekey,
    "lock": _lock,
    "present": _present,
    "delete_others": _delete_others,
    "equal": _equal,
    "append": _append,
}
