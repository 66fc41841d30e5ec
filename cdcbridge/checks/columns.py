"""Check that the columns in a consumer's `key`, `columns` and `sink.mask` settings exist in its tables.

A misspelled name in `columns.exclude` or in `mask` would deliver the value that it was meant to hide. A misspelled name
in `key` would give every message a null key. This module never accesses a database.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence

from cdcbridge.config import Consumer
from cdcbridge.problem import Problem
from cdcbridge.source.tables import Table


def column_problems(consumer: Consumer, tables: Sequence[Table]) -> Iterator[Problem]:
    """Yield a problem for each name in `key`, `columns` and `sink.mask` that the consumer's tables do not have.

    A masked column of a key is a problem, too, because a key is delivered as it is. Without tables, the names cannot be
    compared, and the function yields nothing.
    """
    if not tables:
        return
    yield from _key(consumer, tables)
    delivered = {c.name for table in tables for c in table.columns if not c.generated}
    every = {c.name for table in tables for c in table.columns}
    chosen = consumer.columns
    for name in (chosen.exclude or ()) if chosen else ():
        if name not in every:
            yield _unknown(consumer, "columns.exclude", name, no_such_column(name, tables), every, topics_of(tables))
    for name in (chosen.include or ()) if chosen else ():
        if name not in delivered:
            yield _unknown(
                consumer, "columns.include", name, no_such_column(name, tables), delivered, topics_of(tables)
            )
    for name in consumer.sink.mask if consumer.sink is not None else ():
        if name not in delivered:
            yield _unknown(consumer, "sink.mask", name, no_such_column(name, tables), delivered, topics_of(tables))
        yield from _masked_key(consumer, name, tables)


def _masked_key(consumer: Consumer, name: str, tables: Sequence[Table]) -> Iterator[Problem]:
    for table in tables:
        index = table.primary_key or table.identity_index
        if name in (consumer.key or (index.columns if index is not None else ())):
            message = f"consumer {consumer.name}: sink.mask hides {name}, but the key of its messages shows it"
            fix = f"Set `key` of the consumer to other columns, or remove {name} from sink.mask."
            yield Problem("masked_key", "error", table.topic, message, fix)


def _key(consumer: Consumer, tables: Sequence[Table]) -> Iterator[Problem]:
    for name in consumer.key or ():
        for table in tables:
            columns = {column.name for column in table.columns}
            if name not in columns:
                yield _unknown(consumer, "key", name, f"{table.topic} has no column {name}", columns, table.topic)
            elif name in table.generated:
                said = f"it is a generated column of {table.topic}, which `record` does not have"
                yield _unknown(consumer, "key", name, said, columns - set(table.generated), table.topic)


def _unknown(consumer: Consumer, setting: str, name: str, said: str, columns: Iterable[str], where: str) -> Problem:
    fix = (
        near_column(name, columns)
        or f"Correct {setting} of the consumer. The columns are {', '.join(sorted(columns))}."
    )
    return Problem("unknown_column", "error", where, f"consumer {consumer.name}: {setting} names {name}: {said}", fix)


def near_column(name: str, columns: Iterable[str]) -> str | None:
    """Return a fix that proposes the most similar column, or None if no column is similar."""
    near = difflib.get_close_matches(name, sorted(columns), n=1)
    return f"Write {near[0]} instead of {name}." if near else None


def no_such_column(name: str, tables: Sequence[Table]) -> str:
    """Return a sentence about the missing column, for example `public.orders has no column crad`."""
    if any(name in table.generated for table in tables):
        return f"{name} is a generated column, which `record` does not have"
    return f"none of its tables has a column {name}" if len(tables) > 1 else f"{tables[0].topic} has no column {name}"


def topics_of(tables: Sequence[Table]) -> str:
    """Return the names of the first three tables, for example `public.a, public.b, public.c and others`."""
    return ", ".join(table.topic for table in tables[:3]) + (" and others" if len(tables) > 3 else "")
