"""Check a filter against the tables: its columns, its comparisons, and its results on sample rows.

A filter that matches few rows is no problem. The check reports comparisons that have the same result for every row, and
filters that would turn rows into dead letters. This module never accesses a database.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

from cdcbridge.checks.columns import near_column, no_such_column, topics_of
from cdcbridge.checks.documents import failing_documents
from cdcbridge.checks.kinds import faults, numbers_of, other_form
from cdcbridge.config import Consumer
from cdcbridge.problem import Problem, Severity
from cdcbridge.routing.comparisons import Comparison, Literal, comparisons
from cdcbridge.routing.filters import Filter, FilterError
from cdcbridge.routing.router import OPERATIONS
from cdcbridge.source.tables import Column, Table

_OPS: Final = (*OPERATIONS, "read")
_TEXTS: Final = ("x", "", "1", "1.5", "true", "2026-01-01T00:00:00Z", "1h", "a@b.c")
_MOST_NUMBERS: Final = 6  # the most values that numbers_of() returns
_UNKNOWN: Final = "any"  # the kind of a column that may hold any JSON
_JSON: Final = frozenset({"json", "jsonb"})


def filter_problems(consumer: Consumer, tables: Sequence[Table]) -> Iterator[Problem]:
    """Yield the problems of a consumer's filter, judged by the consumer's tables."""
    if consumer.filter is None:
        return
    if not consumer.tables:
        said = "the filter has no effect: a published message of a listed topic is always delivered"
        yield _problem(consumer, "filter_unused", ", ".join(consumer.topics), said, "Remove the filter.", "warning")
    if not tables:
        return
    compiled = Filter(consumer.filter)
    delivered = {c.name for table in tables for c in table.columns if not c.generated}
    unknown = sorted(compiled.columns - delivered)
    for name in unknown:
        fix = near_column(name, delivered) or f"Correct the filter. The columns are {', '.join(sorted(delivered))}."
        said = f"the filter reads {name}, and {no_such_column(name, tables)}"
        yield _problem(consumer, "filter_column", topics_of(tables), said, fix)
    found = list(comparisons(consumer.filter))
    yield from _names(consumer, found, tables)
    judged = {t.topic: [*_columns(consumer, found, t), *_operations(consumer, compiled, t)] for t in tables}
    if not unknown:
        for table in tables:
            if not any(problem.severity == "error" for problem in judged[table.topic]):
                judged[table.topic] += _tried(consumer, compiled, table)
    everywhere = all(any(p.severity == "error" for p in problems) for problems in judged.values())
    for topic, problems in judged.items():
        for problem in problems:
            # A table that only a wildcard covers may be created at any time. Its error must not stop the others.
            lenient = problem.severity == "error" and not everywhere and topic not in consumer.tables
            yield Problem(problem.code, "warning", *_rest(problem)) if lenient else problem
    yield from _leaving(consumer, tables)


def _names(consumer: Consumer, found: Sequence[Comparison], tables: Sequence[Table]) -> Iterator[Problem]:
    """Find literals that `op`, `topic` or `meta` can never be equal to."""
    known = {
        "topic": [table.topic for table in tables],
        "meta.table": [table.name for table in tables],
        "meta.schema": [table.schema for table in tables],
    }
    for one, literal in _each(found):
        if one.subject == "op" and literal.value not in _OPS:
            fix = _instead(literal, _OPS) or f"An op is one of {', '.join(_OPS)}."
            said = f"the filter compares op with {literal.text}, which no change has"
            yield _problem(consumer, "filter_op", topics_of(tables), said, fix)
        elif one.subject in known and literal.value not in known[one.subject]:
            names = known[one.subject]
            fix = _instead(literal, names) or f"The consumer's tables have {', '.join(sorted(set(names))[:5])}."
            said = f"the filter compares {one.subject} with {literal.text}, which no table of the consumer has"
            yield _problem(consumer, "filter_name", topics_of(tables), said, fix, "warning")


def _columns(consumer: Consumer, found: Sequence[Comparison], table: Table) -> Iterator[Problem]:
    """Find literals that do not fit the column of this table with which the filter compares them."""
    columns = {column.name: column for column in table.columns}
    for one, literal in _each(found):
        column = columns.get(one.member or "") if one.variable in ("record", "old") else None
        if column is None or literal.value is None or column.kind == _UNKNOWN:
            continue
        kind = _kind(literal.value)
        then = "this is never true" if one.operator in ("==", "in") else "this is always true"
        if kind != column.kind:
            ordered = one.operator not in ("==", "!=", "in")
            then = "every row becomes a dead letter" if ordered else then
            said = (
                f"the filter compares {one.subject} with the {kind} {literal.text}, and {column.name} of {table.topic}"
            )
            said += f" is {column.type}, a {column.kind} in `record`: {then}"
            yield _problem(consumer, "filter_type", table.topic, said, _converted(column, literal))
        elif column.labels and one.operator in ("==", "!=", "in") and literal.value not in column.labels:
            fix = _instead(literal, column.labels) or f"It is one of {', '.join(column.labels)}."
            said = f"the filter compares {one.subject} with {literal.text}, which is no value of the enum {column.type}"
            yield _problem(consumer, "filter_label", table.topic, f"{said}: {then}", fix)
        elif (width := _width(column)) and one.operator in ("==", "!=", "in") and len(literal.value) != width:
            said = f"the filter compares {one.subject} with {literal.text}, and {column.name} of {table.topic} is"
            said += f" {column.type}: its values have {width} characters, with blanks at the end: {then}"
            padded = literal.value.ljust(width)
            yield _problem(
                consumer, "filter_padding", table.topic, said, f"Write '{padded}' instead of {literal.text}."
            )
        elif isinstance(literal.value, str) and (fault := other_form(one, literal, column)):
            yield _problem(consumer, fault.code, table.topic, fault.said, fault.fix, fault.severity)


def _operations(consumer: Consumer, compiled: Filter, table: Table) -> Iterator[Problem]:
    """Find operations that always fail on columns of these types, or that depend on how a number is written."""
    for fault in faults(compiled.tree, compiled.source, table):
        yield _problem(
            consumer, fault.code, table.topic, f"in the filter, {fault.said}", fault.fix, severity=fault.severity
        )


def _tried(consumer: Consumer, compiled: Filter, table: Table) -> Iterator[Problem]:
    """Find faults in the filter's results on sample rows of the table."""
    used = [c for c in table.columns if not c.generated]
    # A delete is tried only if there is no other operation. If it lacks a column of the filter, it is always delivered.
    operations: list[str] = [op for op in ("insert", "update") if op in consumer.operations] or ["delete"]
    results = [_result(compiled, table, op, row) for op in operations for row in _rows(used, compiled)]
    open_ended = any(c.kind == _UNKNOWN for c in used if c.name in compiled.columns)
    failed = [text for given, text in results if given in ("fails", "fails by type")]
    by_type = bool(results) and all(given == "fails by type" for given, _ in results)
    wrong = next((text for given, text in results if given == "wrong"), None)
    if wrong is not None:
        fix = "Compare it with something, for example `record.status == 'paid'`."
        yield _problem(consumer, "filter_no_boolean", table.topic, f"{wrong}: every row becomes a dead letter", fix)
        return
    if by_type and not open_ended:
        said = f"the filter fails on every row of {table.topic}, which becomes a dead letter: {failed[0]}"
        yield _problem(consumer, "filter_fails", table.topic, said, _fix(compiled, used))
        return
    typical = dict(next(_rows(used, compiled)))
    for column in used:
        if not column.nullable or column.name not in compiled.columns or column.kind == _UNKNOWN:
            continue
        given, text = _result(compiled, table, "insert", {**typical, column.name: None})
        if given.startswith("fails") and not _result(compiled, table, "insert", typical)[0].startswith("fails"):
            said = f"the filter fails where {column.name} of {table.topic} is null, and the row becomes a dead letter"
            fix = f"Write `record.{column.name} != null && …`, or declare the column not null."
            yield _problem(consumer, "filter_null", table.topic, f"{said}: {text}", fix, "warning")
    yield from _numbers(consumer, compiled, table, typical)
    yield from _documents(consumer, compiled, table, typical)


def _numbers(consumer: Consumer, compiled: Filter, table: Table, typical: dict[str, Any]) -> Iterator[Problem]:
    """Find number columns with a value on which the filter fails: `10 / record.a` fails if a is 0."""
    if _result(compiled, table, "insert", typical)[0].startswith("fails"):
        return
    for column in table.columns:
        if column.generated or column.kind != "number" or column.name not in compiled.columns:
            continue
        for value in numbers_of(column):
            given, text = _result(compiled, table, "insert", {**typical, column.name: value})
            if given.startswith("fails"):
                said = f"the filter fails where {column.name} of {table.topic} is {value}, and the row becomes a dead"
                fix = f"Test it first: `record.{column.name} != {value} && …`."
                yield _problem(consumer, "filter_value", table.topic, f"{said} letter: {text}", fix, "warning")
                break


def _documents(consumer: Consumer, compiled: Filter, table: Table, typical: dict[str, Any]) -> Iterator[Problem]:
    """Find json columns with documents on which the filter fails: null, {}, [], and members that are null."""
    literals = [literal.value for one in comparisons(compiled.source) for literal in one.literals]
    # Two rows, because one may skip a part of the expression: after `false && …` nothing more is evaluated.
    rows = [typical, _matching(typical, compiled)]
    for column in table.columns:
        if column.generated or column.name not in compiled.columns or column.type not in _JSON:
            continue

        def fails(source: str, document: Any, name: str = column.name) -> bool:
            return any(
                _result(Filter(source), table, "insert", {**row, name: document})[0].startswith("fails") for row in rows
            )

        bad = failing_documents(compiled.source, column.name, nullable=column.nullable, literals=literals, fails=fails)
        if bad is not None:
            shown = " or ".join(
                [", ".join(bad.documents[:-1]), bad.documents[-1]] if bad.documents[1:] else bad.documents
            )
            said = (
                f"the filter fails where {column.name} of {table.topic} is {shown}, and the row becomes a dead letter"
            )
            yield _problem(consumer, "filter_null", table.topic, said, bad.fix, "warning")


def _matching(typical: dict[str, Any], compiled: Filter) -> dict[str, Any]:
    """Return the row in which each compared column has the first literal that it is compared with."""
    found = {one.member: one.literals[0].value for one in comparisons(compiled.source) if one.variable == "record"}
    return {**typical, **{name: value for name, value in found.items() if name in typical}}


def _fix(compiled: Filter, columns: Sequence[Column]) -> str:
    """Return the fix for a filter that fails on every row."""
    times = [c.name for c in columns if c.type.startswith("timestamp") and c.name in compiled.columns]
    for name in times if "timestamp(" in compiled.source else ():
        if f"timestamp(record.{name})" not in compiled.source:
            return f"`record.{name}` is a text: write `timestamp(record.{name})`."
    return "Correct the filter. `cdcbridge filter test` tries it on the latest messages."


def _result(compiled: Filter, table: Table, op: str, row: dict[str, Any]) -> tuple[str, str]:
    """Evaluate the filter on a row, and return the result and the text of the error, if there is one.

    The result is `true`, `false`, `wrong` (not a boolean), `fails`, or `fails by type` (on each row with such types).
    """
    old = row if op == "update" else None
    meta = {"schema": table.schema, "table": table.name, "commit_lsn": "0/1", "ordinal": 0, "xid": 1}
    environment = {"op": op, "topic": table.topic, "key": "1", "record": row, "old": old, "meta": meta}
    try:
        return str(compiled.wants(environment)).lower(), ""
    except FilterError as error:
        text = str(error)
        if text.startswith("the filter gave"):
            return "wrong", text
        return ("fails by type" if error.of_types else "fails"), text


def _rows(columns: Sequence[Column], compiled: Filter) -> Iterator[dict[str, Any]]:
    """Yield sample rows with typical values and with the literals of the filter."""
    literals = [literal.value for one in comparisons(compiled.source) for literal in one.literals]
    texts = [*_TEXTS, *(value for value in literals if isinstance(value, str))]
    numbers = [value for value in literals if _kind(value) == "number"]
    kinds: dict[str, list[Any]] = {
        "number": numbers,
        "boolean": [True, False],
        "list": [["x"], [1], []],
        _UNKNOWN: [{"a": 1}, "x", 1, [], True],
        "text": texts,
    }
    for n in range(max(_MOST_NUMBERS + len(numbers), *(len(values) for values in kinds.values()))):
        yield {c.name: _sample(c, n, kinds[c.kind]) for c in columns}


def _sample(column: Column, n: int, values: Sequence[Any]) -> Any:
    if column.labels:
        values = column.labels
    elif column.type.startswith("timestamp"):
        values = ["2026-01-01T00:00:00" + ("+00:00" if column.type.endswith("with time zone") else "")]
    elif column.type == "date":
        values = ["2026-01-01"]
    elif column.kind == "number":
        values = [*numbers_of(column), *values]
    return values[n % len(values)]


def _leaving(consumer: Consumer, tables: Sequence[Table]) -> Iterator[Problem]:
    """Find tables whose updates do not show whether the old row matched, if the consumer has `on_leave: delete`."""
    for table in tables if consumer.on_leave == "delete" else ():
        if not table.full and not (Filter(consumer.filter or "").columns <= table.identity):
            said = (
                f"on_leave: delete cannot decide whether a row of {table.topic} matched before: each update that does"
            )
            said += " not match is delivered as a delete, with the columns of the replica identity alone"
            fix = f"alter table {table.identifier.as_string()} replica identity full;"
            yield _problem(consumer, "on_leave_identity", table.topic, said, fix, "warning")


def _each(found: Sequence[Comparison]) -> Iterator[tuple[Comparison, Literal]]:
    for one in found:
        for literal in one.literals:
            yield one, literal


def _kind(value: Any) -> str:
    return "boolean" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"


def _converted(column: Column, literal: Literal) -> str:
    value = literal.value
    if column.kind == "text":
        return f"Write '{literal.text}' instead of {literal.text}."
    if column.kind == "boolean" and value in ("true", "false"):
        return f"Write {value} instead of {literal.text}."
    if column.kind == "number" and isinstance(value, str) and value.replace(".", "", 1).lstrip("-").isdigit():
        return f"Write {value} instead of {literal.text}."
    return f"Compare it with a {column.kind}."


def _width(column: Column) -> int:
    """Return n for character(n), whose values are padded with blanks, and 0 for other types."""
    width = column.type.removeprefix("character(").removesuffix(")")
    return int(width) if column.type.startswith("character(") and width.isdigit() else 0


def _instead(literal: Literal, names: Collection[str]) -> str | None:
    by_case = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(literal.value).lower(), sorted(by_case), n=1)
    return f"Write '{by_case[near[0]]}' instead of {literal.text}." if near else None


def _problem(consumer: Consumer, code: str, where: str, said: str, fix: str, severity: Severity = "error") -> Problem:
    return Problem(code, severity, where, f"consumer {consumer.name}: {said}", fix)


def _rest(problem: Problem) -> tuple[str, str, str]:
    return problem.object, problem.message, problem.fix
