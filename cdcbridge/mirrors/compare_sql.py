"""Write the SQL that reads a table in chunks, and that hashes and reads rows by their keys, for `mirror verify`.

Both sides read in the order of their own index, and look rows of the other side up by their keys. The order of keys on
two servers, which may have different collations, therefore never matters. This module never runs a statement.
"""

from __future__ import annotations

from psycopg import sql

from cdcbridge.mirrors.tables import COMMA, TargetTable, named, typed

_AND = sql.SQL(" and ")


def chunk(table: TargetTable, *, first: bool) -> sql.Composed:
    """Return the next keys of a table in its own order.

    The parameters are the texts of the last key before the chunk, except for the first chunk, and the number of rows.
    The row of the result has the number of keys, the keys as a JSON array, and the texts of the last key.
    """
    after: sql.Composable = sql.SQL("")
    if not first:
        given = COMMA.join(sql.SQL("%s::{}").format(typed(table.columns[name].type)) for name in table.key)
        after = sql.SQL("where ({}) > ({})").format(_keys(table), given)
    texts = COMMA.join(sql.SQL("t.{}::text").format(named(name)) for name in table.key)
    return sql.SQL(
        "with c as materialized (select row_number() over (order by {keys}) as n,"
        " (select row_to_json(k.*)::text from (select {shown}) k) as identity, array[{texts}] as texts"
        " from {table} t {after} order by {keys} limit %s)"
        " select count(*), '[' || string_agg(identity, ',' order by n) || ']',"
        " (select texts from c order by n desc limit 1) from c"
    ).format(keys=_keys(table), shown=_shown(table, table.key), texts=texts, table=table.named, after=after)


def digest(table: TargetTable, columns: tuple[str, ...]) -> sql.Composed:
    """Return the number of rows with the keys in the parameter, and one hash of all of them in the keys' order."""
    return sql.SQL("select count(*), md5(string_agg(h, ',' order by n)) from ({}) x").format(_hashes(table, columns))


def hashes(table: TargetTable, columns: tuple[str, ...]) -> sql.Composed:
    """Return the hash of each row with a key in the parameter, after the ordinal of its key from 1 on."""
    return sql.SQL("select n, h from ({}) x").format(_hashes(table, columns))


def _hashes(table: TargetTable, columns: tuple[str, ...]) -> sql.Composed:
    return sql.SQL(
        "select r.cdcbridge_n as n,"
        " md5(convert_to((select row_to_json(s.*)::text from (select {shown}) s), 'UTF8')) as h"
        " from {given} join {table} t on {matches}"
    ).format(shown=_shown(table, columns), given=_given(table), table=table.named, matches=_matches(table))


def rows(table: TargetTable, columns: tuple[str, ...], *, lock: bool = False) -> sql.Composed:
    """Return the rows with a key in the parameter as JSON texts, each after the ordinal of its key from 1 on."""
    return sql.SQL(
        "select r.cdcbridge_n, (select row_to_json(s.*)::text from (select {shown}) s)"
        " from {given} join {table} t on {matches} order by {keys}{lock}"
    ).format(
        shown=_shown(table, columns),
        given=_given(table),
        table=table.named,
        matches=_matches(table),
        keys=_keys(table),
        lock=sql.SQL(" for update of t" if lock else ""),
    )


def converted(table: TargetTable, columns: tuple[str, ...]) -> sql.Composed:
    """Return the rows in the parameter as the table's types write them, in the same order."""
    shown = COMMA.join(_as_in_log(table, name, table.value(name)) for name in columns)
    query = sql.SQL("select (select row_to_json(s.*)::text from (select {}) s) from {}")
    return query.format(shown, table.rows(columns))


def _keys(table: TargetTable) -> sql.Composed:
    return COMMA.join(named("t", name) for name in table.key)


def _shown(table: TargetTable, columns: tuple[str, ...]) -> sql.Composed:
    return COMMA.join(_as_in_log(table, name, named("t", name)) for name in columns)


def _as_in_log(table: TargetTable, name: str, value: sql.Composable) -> sql.Composed:
    """Return the select list's item of a column. A composite value is a text, as in the log."""
    column = table.columns[name]
    cast = "::text[]" if column.elements else "::text" if column.as_text else ""
    return sql.SQL("({}){} as {}").format(value, typed(cast), named(name))


def _given(table: TargetTable) -> sql.Composed:
    """Return a FROM item with the ordinals and the keys in the parameter."""
    values = COMMA.join(sql.SQL("{} as {}").format(table.value(name), named(name)) for name in table.key)
    return sql.SQL("(select row_number() over () as cdcbridge_n, {} from {}) r").format(values, table.rows(table.key))


def _matches(table: TargetTable) -> sql.Composed:
    return _AND.join(sql.SQL("t.{0} = r.{0}").format(named(name)) for name in table.key)
