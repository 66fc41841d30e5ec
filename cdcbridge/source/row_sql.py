"""The SQL that makes keys and records of a table's rows, equal to those that the stream brings. Part of the rim."""

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
    """The key as text: of one column as `record ->> column`; of several a compact JSON array of such texts."""
    texts = [_NULL_TEXT if column is None else column.text for column in columns]
    if len(texts) < 2:
        return texts[0] if texts else _NULL_TEXT
    parts = sql.SQL(" || ',' || ").join(sql.SQL("coalesce(to_json({})::text, 'null')").format(text) for text in texts)
    nulls = sql.SQL(" and ").join(sql.SQL("{} is null").format(text) for text in texts)
    return sql.SQL("case when {} then null else '[' || {} || ']' end").format(nulls, parts)


def record_of(alias: str, columns: Iterable[ReadColumn]) -> sql.Composable:
    """The record as JSON text, from a subquery `alias` that shows these columns. It has one line, as all messages."""
    # Qualified, because a column may have the alias for its name.
    text = sql.SQL("row_to_json({}.*)::text").format(sql.SQL(alias))
    return one_line(text) if any(column.json for column in columns) else text


def shown(columns: Iterable[ReadColumn]) -> sql.Composable:
    """These columns, of a table that the query calls t."""
    return COMMA.join(column.shown for column in columns)


def read_data(alias: str, columns: Sequence[ReadColumn], left_out: Sequence[ReadColumn]) -> sql.Composable:
    """The message's `data` of a row that is read, with the columns that it does not have as `unchanged`."""
    names = orjson.dumps([column.name for column in left_out]).decode()
    return sql.SQL("{} || {} || {}").format(
        sql.Literal('{"op":"read","record":'),
        record_of(alias, columns) if columns else sql.SQL("'{}'"),
        sql.Literal(',"old":null,"unchanged":' + names + "}"),
    )


def total(sizes: Iterable[sql.Composable | None]) -> sql.Composable:
    """The sum of columns' sizes."""
    return sql.SQL("(0") + sql.SQL("").join(sql.SQL(" + {}").format(s) for s in sizes if s is not None) + sql.SQL(")")


def hashes_query(shape: ReadShape, *, defused: bool) -> sql.Composed:
    """The table's keys and records by bucket, as log_hashes() has the log's."""
    return sql.SQL(
        "select {}, count(*), sum(('x' || left(md5(convert_to(s.key || s.record::text, 'UTF8')), 15))::bit(60)::bigint)"
        " from {} group by 1"
    ).format(_BUCKET, _state(shape, defused=defused))


def records_query(shape: ReadShape, buckets: list[int], *, defused: bool) -> sql.Composed:
    """(key, column → hash of its value) of all rows in these buckets, as log_records() has the log's."""
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
    """JSON text with what jsonb cannot hold made harmless; as defused() does in the store."""
    return sql.SQL("regexp_replace(replace(replace({}, {}, {}), {}, {}), {}, {}, 'g')").format(
        text,
        sql.Literal("\\\\"),
        sql.Literal("\\u005c"),
        sql.Literal("\\u"),
        sql.Literal("\\\\u"),
        sql.Literal("([0-9]{255}|[0-9][eE][-+]?[0-9]{3})[0-9]+"),
        sql.Literal("\\1"),
    )
