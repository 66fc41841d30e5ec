"""Write the SQL of a revert: values as they were in the log, rows by their key, and one statement for each step.

This module never runs a statement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import orjson
from psycopg import sql

from cdcbridge.revert.messages import TextRow, as_value
from cdcbridge.revert.plan import UndoStep
from cdcbridge.routing.annotations import PREFIX
from cdcbridge.routing.logical_messages import elements
from cdcbridge.source.row_sql import COMMA, record_of, shown
from cdcbridge.source.shapes import JSON, ReadColumn, ReadShape

_JSONB: Final = 3802
_VECTORS: Final = (22, 30)  # int2vector and oidvector, whose text has no braces
_JSON_ARRAYS: Final = (199, 3807)  # json[] and jsonb[]
_AND: Final = sql.SQL(" and ")


def annotation(reverts: dict[str, object]) -> sql.Composed:
    """Return the statement that annotates the transaction as a revert."""
    content = orjson.dumps({"reverts": reverts}).decode()
    return sql.SQL("select pg_logical_emit_message(true, {}, {})").format(sql.Literal(PREFIX), _literal(content))


def statement(step: UndoStep, shape: ReadShape) -> sql.Composed | None:
    """Return the statement of a step, or None for a step without one."""
    columns = _by_name(shape)
    values = [(columns[name], _value(columns[name], text, shape)) for name, text in step.values.items()]
    if step.act == "insert":
        if not values:
            return sql.SQL("insert into {} default values").format(shape.identifier)
        return sql.SQL("insert into {} ({}) overriding system value values ({})").format(
            shape.identifier,
            COMMA.join(sql.Identifier(column.name) for column, _ in values),
            COMMA.join(value for _, value in values),
        )
    if step.act == "delete":
        return sql.SQL("delete from {} t where {}").format(shape.rows, _one(step.where, shape))
    if step.act == "update":
        assigned = COMMA.join(sql.SQL("{} = {}").format(sql.Identifier(c.name), value) for c, value in values)
        return sql.SQL("update {} t set {} where {}").format(shape.rows, assigned, _one(step.where, shape))
    return None


def find(where: TextRow, shape: ReadShape) -> sql.Composed:
    """Return the query for the record of the row with this key, as JSON text."""
    return sql.SQL("select {} from {} t cross join lateral (select {}) r where {}").format(
        record_of("r", shape.columns), shape.rows, shown(shape.columns), _at_key(where, shape)
    )


def lock(where: TextRow, shape: ReadShape) -> sql.Composed:
    """Return the query that locks the row with this key until the transaction ends."""
    return sql.SQL("select from {} t where {} for update").format(shape.rows, _at_key(where, shape))


def count(image: TextRow, shape: ReadShape) -> sql.Composed:
    """Return the query for the number of rows that have all these values."""
    return sql.SQL("select count(*) from {} t where {}").format(shape.rows, _at_image(image, shape))


def read_back(values: TextRow, shape: ReadShape) -> sql.Composed:
    """Return the query for the values as the table would have them, as JSON text of a record."""
    columns = [column for column in shape.columns if column.name in values]
    written = [
        sql.SQL("{}{} as {}").format(
            _value(column, values[column.name], shape),
            sql.SQL(f"::{column.cast}" if column.cast else ""),
            sql.Identifier(column.name),
        )
        for column in columns
    ]
    return sql.SQL("select {} from (select {}) r").format(record_of("r", columns), COMMA.join(written))


def ambiguous(column: ReadColumn, text: str) -> bool:
    """Return whether the value has one form in JSON, and several ones in the column.

    For example, [[1]] may be a json[] of one array, or one of two dimensions with the number 1.
    """
    return (
        column.base in _JSON_ARRAYS and "[" in {element[0] for element in elements(text)} if text != "null" else False
    )


def referring(shape: ReadShape, columns: Sequence[str], row: TextRow, keys: Sequence[str]) -> sql.Composed:
    """Return the query for the number of rows of the table that refer to a row of another one.

    Args:
        shape: The table that refers.
        columns: Its columns that refer.
        row: The row to which they refer.
        keys: The columns of that row, in the same order.
    """
    mine = _by_name(shape)
    pairs = zip(columns, keys, strict=True)
    conditions = (sql.SQL("{} = {}").format(mine[c].of_t, _value(mine[c], row[k], shape)) for c, k in pairs)
    return sql.SQL("select count(*) from {} t where {}").format(shape.rows, _AND.join(conditions))


def _by_name(shape: ReadShape) -> dict[str, ReadColumn]:
    return {column.name: column for column in shape.columns}


def _value(column: ReadColumn, text: str, shape: ReadShape) -> sql.Composable:
    """Return SQL for a value of the log, of the column's own type.

    Most types read the text that the log has. PostgreSQL itself makes an array of a JSON array.
    """
    if text == "null":
        return sql.SQL("null")
    if column.base in (JSON, _JSONB):
        written: str | None = text
    elif column.base in _JSON_ARRAYS:
        return sql.SQL("array[{}]::{}").format(
            COMMA.join(sql.SQL("null") if e == "null" else _literal(e) for e in elements(text)), sql.SQL(column.type)
        )
    elif text.startswith("[") and column.base in _VECTORS:
        written = " ".join(str(item) for item in orjson.loads(text))
    elif text.startswith("["):
        document = f"{{{orjson.dumps(column.name).decode()}:{text}}}"
        return sql.SQL("(json_populate_record(null::{}, {})).{}").format(
            shape.identifier, _literal(document), sql.Identifier(column.name)
        )
    else:
        written = as_value(text)
    return sql.SQL("{}::{}").format(_literal(written or ""), sql.SQL(column.type))


def _literal(text: str) -> sql.Composable:
    """Return the text as a literal on one line.

    People copy the statements from a terminal, which would take some characters for commands.
    """
    if text.isprintable():
        return sql.Literal(text)
    doubled = text.replace("\\", "\\\\").replace("'", "''")
    escaped = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in doubled)
    return sql.SQL(f"E'{escaped}'")


def _one(where: TextRow, shape: ReadShape) -> sql.Composable:
    """Return the condition for the row of a step. Without a key, one of the rows with all these values is taken."""
    if shape.order:
        return _at_key(where, shape)
    return sql.SQL("(t.tableoid, t.ctid) = (select t.tableoid, t.ctid from {} t where {} limit 1 for update)").format(
        shape.rows, _at_image(where, shape)
    )


def _at_key(where: TextRow, shape: ReadShape) -> sql.Composable:
    return _AND.join(
        sql.SQL("{} {} {}").format(
            key.sorted,
            sql.SQL("=") if key.ordinary else key.operators[2],
            _value(key.column, where[key.column.name], shape),
        )
        for key in shape.order
    )


def _at_image(image: TextRow, shape: ReadShape) -> sql.Composable:
    """Return the condition for rows with the same bytes in all columns, which works for types without `=`."""
    columns = [column for column in shape.columns if column.name in image]
    return sql.SQL("record_image_eq(row({}), row({}))").format(
        COMMA.join(column.of_t for column in columns),
        COMMA.join(sql.SQL("{}::{}").format(_value(c, image[c.name], shape), sql.SQL(c.type)) for c in columns),
    )
