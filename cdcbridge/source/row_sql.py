"""Write the SQL that makes keys and records from a table's rows, equal to the keys and records from the stream.

This module never runs a query.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import orjson
from psycopg import sql

from cdcbridge.source.shapes import ReadColumn, ReadShape, one_line

COMMA: Final = sql.SQL(", ")
NONE: Final = sql.SQL("")
_NULL_TEXT: Final = sql.SQL("null::text")
_BUCKET: Final = sql.SQL("('x' || left(md5(convert_to(s.key, 'UTF8')), 3))::bit(12)::int")


def key_of(columns: Sequence[ReadColumn | None]) -> sql.Composable:
    """Return SQL for the key as text.

    The key of one column is the text that `record ->> column` gives. The key of several columns is a compact JSON array
    of such texts, for example `["7","a"]`.
    """
    texts = [_NULL_TEXT if column is None else column.text for column in columns]
    if len(texts) < 2:
        return texts[0] if texts else _NULL_TEXT
    parts = sql.SQL(" || ',' || ").join(sql.SQL("coalesce(to_json({})::text, 'null')").format(text) for text in texts)
    nulls = sql.SQL(" and ").join(sql.SQL("{} is null").format(text) for text in texts)
    return sql.SQL("case when {} then null else '[' || {} || ']' end").format(nulls, parts)


def record_of(alias: str, columns: Iterable[ReadColumn]) -> sql.Composable:
    """Return SQL for the record as JSON text, from a subquery `alias` that selects these columns.

    The text has one line, as in all messages.
    """
    # Qualified, because a column may have the same name as the alias.
    text = sql.SQL("row_to_json({}.*)::text").format(sql.SQL(alias))
    return one_line(text) if any(column.json for column in columns) else text


def shown(columns: Iterable[ReadColumn]) -> sql.Composable:
    """Return the select list of these columns, for a query that calls the table `t`."""
    return COMMA.join(column.shown for column in columns)


def read_data(alias: str, columns: Sequence[ReadColumn], left_out: Sequence[ReadColumn]) -> sql.Composable:
    """Return SQL for the `data` of the message for a row that a backfill reads.

    Args:
        alias: The subquery that selects the columns.
        columns: The columns of the record.
        left_out: The columns that the message omits. Their names are listed as `unchanged`.
    """
    names = orjson.dumps([column.name for column in left_out]).decode()
    return sql.SQL("{} || {} || {}").format(
        sql.Literal('{"op":"read","record":'),
        record_of(alias, columns) if columns else sql.SQL("'{}'"),
        sql.Literal(',"old":null,"unchanged":' + names + "}"),
    )


def total(sizes: Iterable[sql.Composable | None]) -> sql.Composable:
    """Return SQL for the sum of the columns' sizes."""
    return sql.SQL("(0") + sql.SQL("").join(sql.SQL(" + {}").format(s) for s in sizes if s is not None) + sql.SQL(")")


def hashes_query(shape: ReadShape, *, defused: bool) -> sql.Composed:
    """Return a query that hashes the table's keys and records by bucket, as log_hashes() does for the log.

    With `defused`, the parts of a record that jsonb cannot hold are replaced before.
    """
    return sql.SQL(
        "select {}, count(*), sum(('x' || left(md5(convert_to(s.key || s.record::text, 'UTF8')), 15))::bit(60)::bigint)"
        " from {} group by 1"
    ).format(_BUCKET, _state(shape, defused=defused))


def records_query(shape: ReadShape, buckets: list[int], *, defused: bool) -> sql.Composed:
    """Return a query for the rows in these buckets, as log_records() returns them for the log.

    Each row of the result contains the key, and a JSON object with the hash of each column's value.
    """
    return sql.SQL(
        "select s.key, (select json_object_agg(c.key, left(md5(convert_to(case when jsonb_typeof(c.value) = 'number'"
        " then trim_scale(c.value::numeric)::text else c.value::text end, 'UTF8')), 16))"
        " from jsonb_each(s.record) c) from {} where {} = any ({}::int[]) order by convert_to(s.key, 'UTF8')"
    ).format(_state(shape, defused=defused), _BUCKET, sql.Literal(buckets))


def _state(shape: ReadShape, *, defused: bool) -> sql.Composed:
    record = record_of("r", shape.columns)
    return sql.SQL(
        "(select {key} as key, {record}::jsonb as record from {rows} t cross join lateral (select {shown}) r) s"
    ).format(
        key=key_of(shape.key),
        record=_defused(record) if defused else record,
        rows=shape.rows,
        shown=shown(shape.columns),
    )


def _defused(text: sql.Composable) -> sql.Composable:
    """Return SQL that replaces the parts of JSON text which jsonb cannot hold, as defused() does in the store."""
    return sql.SQL("regexp_replace(replace(replace({}, {}, {}), {}, {}), {}, {}, 'g')").format(
        text,
        sql.Literal("\\\\"),
        sql.Literal("\\u005c"),
        sql.Literal("\\u"),
        sql.Literal("\\\\u"),
        sql.Literal("([0-9]{255}|[0-9][eE][-+]?[0-9]{3})[0-9]+"),
        sql.Literal("\\1"),
    )
