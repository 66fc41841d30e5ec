"""Filters that calculate: numbers of both kinds, what fails, and what `check` says beforehand."""

from __future__ import annotations

from typing import Any

import pytest

from cdcbridge.checks.filters import filter_problems
from cdcbridge.config import Consumer
from cdcbridge.problem import Problem
from cdcbridge.routing.filters import Filter, FilterError
from cdcbridge.source.tables import Column, Table

BIG = 2**53 + 1


def wants(source: str, **row: Any) -> bool:
    return Filter(source).wants({"op": "insert", "topic": "t", "key": "1", "record": row, "old": None, "meta": {}})


def fails(source: str, **row: Any) -> FilterError:
    with pytest.raises(FilterError) as raised:
        wants(source, **row)
    return raised.value


@pytest.mark.parametrize(("source", "delivers", "leaves_out"), [
    ("record.p * 1.5 > 4", [3, 3.0, 3.5], [1, 1.0, 1.5]),
    ("1.5 * record.p > 4", [3, 3.0, 3.5], [1, 1.0, 1.5]),
    ("record.p * 3 > 5", [3, 3.0, 2.5], [1, 1.0, 1.5]),
    ("record.p / 2.0 > 1", [3, 3.0, 2.5, BIG], [2, 2.0, -3]),
    ("record.p + 0.5 > 3", [3, 3.0, 2.6], [2, 2.0, 2.5]),
    ("record.p - 1 > 1", [3, 3.0, 2.5], [2, 2.0, 1.5]),
    ("0.5 - record.p < 0", [3, 3.0, 1.5], [0, 0.0, 0.5]),
    ("record.p % 2 == 1", [3, 3.0, 2**63 - 1], [2, 2.0, 1.5, -3, -3.0]),
    ("record.p % 1.5 == 0", [3, 3.0, 1.5], [2, 2.0]),
    ("-record.p < -2", [3, 3.0, 2.5], [1, 1.0, 1.5]),
    ("-record.p * 1.5 < -2", [3, 3.0, 2.5], [1, 1.0]),
    ("(record.p + 1) * 2 - 1 == 7", [3, 3.0], [1, 1.5]),
    ("record.p != null && record.p * 2 > 5", [3, 3.0, 2.6], [None, 1, 1.5]),
    ("record.p > 2 ? record.p * 1.5 > 4 : false", [3, 3.0], [1, 1.5]),
    ("[1, 2.5].exists(x, x * record.p > 7)", [3, 3.0, 3.5], [1, 1.5]),
    ("{'a': record.p * 1.5}.a > 4", [3, 3.0], [1]),
    ("record.p + 1 == 9007199254740994", [BIG], [2**53, BIG + 1]),
    ("record.p * 1 == 9007199254740993", [BIG], [2**53]),
    ("record.p - 9007199254740993 == 0", [BIG], [2**53]),
    ("record.p / 2 == 1 // whole: record.p * 'x'", [3, 2, 2.0], [1, 3.0, 4, -3]),
    ("record.p / 2 == -1", [-3, -2, -2.0], [3, -1, -3.0]),
    ("1e-1 * record.p < .4", [3, 3.0], [5, 4.5]),
])  # fmt: skip
def test_numbers_of_both_kinds_have_one_arithmetic(source: str, delivers: list[Any], leaves_out: list[Any]) -> None:
    assert [wants(source, p=value) for value in delivers] == [True] * len(delivers)
    assert [wants(source, p=value) for value in leaves_out] == [False] * len(leaves_out)


@pytest.mark.parametrize(("source", "row"), [
    ("record.s + 'x' == 'px'", {"s": "p"}), ("record.s + record.t == 'px'", {"s": "p", "t": "x"}), ("record.l + record.m == [1, 2]", {"l": [1], "m": [2]}),
    ("record.l + [2] == [1, 2]", {"l": [1]}), ("record.l[record.p - 1] == 7", {"l": [7], "p": 1}), ("size(record.l) * 1.5 > 1", {"l": [1]}),
    ("timestamp(record.a) - timestamp(record.b) > duration('1h')", {"a": "2026-01-01T03:00:00Z", "b": "2026-01-01T00:00:00+00:00"}),
    ("timestamp(record.a) - duration('1h') > timestamp(record.b)", {"a": "2026-01-01T03:00:00Z", "b": "2026-01-01T00:00:00+00:00"}),
    ("record.e.n * 1.5 > 1", {"e": {"n": 1}}), ("record.e.n * 1.5 > 1", {"e": {"n": 1.0}}), ("record['e']['n'] * 1.5 > 1", {"e": {"n": 1}}),
    ("record.p * 2 > 1 || record.s + 1 == 2", {"p": 1, "s": "x"}), ("has(record.p) && record.p / 0.0 > 1", {"p": 1}),
    ("int(record.p) / 2 == 1 && double(record.p) / 2 == 1.5", {"p": 3}),
])  # fmt: skip
def test_other_operations_are_those_of_cel(source: str, row: dict[str, Any]) -> None:
    assert wants(source, **row)


@pytest.mark.parametrize(("source", "row", "said", "of_types"), [
    ("record.p * 1.5 > 1", {"p": None}, "record.p * 1.5: CEL has no * for null and a number with decimals. Write record.p != null && … (record.p is null)", True),
    ("record.s + 1 == 2", {"s": "x"}, 'record.s + 1: CEL has no + for a text and an integer. Write string(1) (record.s is the text "x")', True),
    ("record.s * 2.5 > 1", {"s": "3"}, 'record.s * 2.5: CEL has no * for a text and a number with decimals. Write double(record.s) (record.s is the text "3")', True),
    ("record.b + record.b == 2", {"b": True}, "record.b + record.b: CEL has no + for a boolean and a boolean (record.b is the boolean true)", True),
    ("record.b * 1.5 > 1", {"b": True}, "record.b * 1.5: CEL has no * for a boolean and a number with decimals (record.b is the boolean true)", True),
    ("-record.p > 1", {"p": None}, "-record.p: CEL has no - for null (record.p is null)", True),
    ("record.a - record.b > 1", {"a": "2026-01-01", "b": "2025-01-01"}, "record.a - record.b: CEL has no - for a text and a text", True),
    ("record.p > 0 && 10 / (record.p - 3) > 1", {"p": 3}, "10 / (record.p - 3): division by zero (record.p is the number 3)", False),
    ("record.p % 0 == 1", {"p": 1.5}, "record.p % 0: division by zero (record.p is the number 1.5)", False),
    ("record.p * record.p > 1", {"p": 2**40}, "record.p * record.p: the result does not fit into 64 bits. Write double(…)", False),
    ("record.p > 1 && (record.s > 2 || false)", {"p": 3, "s": "x"}, "record.s > 2: a text cannot be compared with an integer. Write double(record.s)", True),
    ("record.p == 3 ? record.s * 2 > 1 : true", {"p": 3, "s": None}, "record.s * 2: CEL has no * for null and an integer", True),
    ("record.l.exists(x, x * 2 > 3)", {"l": ["a"]}, 'CEL has no * for these values (record.l is the list ["a"])', True),
    ("!record.p", {"p": 1}, "!record.p: ! needs true or false, and not an integer", True),
    ("int(record.s) * 1.5 > 1", {"s": "x"}, "invalid digit found in string", False),
])  # fmt: skip
def test_a_reason_names_the_operation(source: str, row: dict[str, Any], said: str, of_types: bool) -> None:
    error = fails(source, **row)
    assert said in str(error) and error.of_types is of_types


ORDERS = Table("public", "orders", 1, "r", "p", False, "d", (
    Column("id", "", False, "integer", "number", nullable=False),
    Column("big", "", False, "bigint", "number", nullable=False),
    Column("p", "", True, "numeric", "number", nullable=False),
    Column("money", "", True, "numeric(20,4)", "number", nullable=False),
    Column("whole", "", True, "numeric(10,0)", "number", nullable=False),
    Column("f", "", True, "double precision", "number", nullable=False),
    Column("amount", "", True, "numeric(20,4)", "number"),
    Column("status", "", False, "text", "text", nullable=False),
    Column("paid", "", False, "boolean", "boolean", nullable=False),
    Column("u", "", False, "uuid", "text", nullable=False),
    Column("d", "", False, "date", "text", nullable=False),
    Column("at", "", False, "timestamp(3) with time zone", "text", nullable=False),
    Column("extra", "", False, "jsonb", "any", nullable=False),
    Column("tags", "", False, "text[]", "list", nullable=False),
), ())  # fmt: skip


def found(source: str) -> list[Problem]:
    return list(filter_problems(Consumer(name="c", filter=source, tables=(ORDERS.topic,)), [ORDERS]))


@pytest.mark.parametrize("source", [
    "record.id * 1.5 > 1.0", "record.big * 1.5 > 1.0", "record.p * 3 > 5", "record.f * 2 > 1", "record.p / 2.0 > 1", "record.p % 2 == 0",
    "record.amount != null && record.amount / 2 > 1", "record.money / 2 > 1", "record.id / 2 > 1", "record.whole / 2 > 1", "int(record.p) / 2 > 1",
    "-record.p < 0", "record.p + record.id - record.f > 0", "record.status + 'x' == 'px'", "record.status + string(record.id) == 'p1'",
    "record.id == record.p", "record.p < record.f", "timestamp(record.at) - timestamp('2026-01-01T00:00:00Z') > duration('1h')",
    "record.tags + ['x'] == ['x']", "record.u == 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'", "record.d >= '2026-01'", "record.d == '2026-01-31'",
    "size(record.tags) * 1.5 > 2", "record.at == '2026-01-31T09:30:00.5+00:00'",
])  # fmt: skip
def test_what_works_is_let_through(source: str) -> None:
    assert found(source) == []


@pytest.mark.parametrize(("source", "code", "severity", "said"), [
    ("record.p / 2 > 1", "filter_division", "error", "Write `record.p / 2.0` for a result with decimals, or `int(record.p) / 2`"),
    ("record.f / record.id > 1", "filter_division", "error", "Write `record.f / double(record.id)` for"),
    ("10 / record.f > 1", "filter_division", "error", "or `10 / int(record.f)` for a whole number"),
    ("record.id > 5 && (record.p + 1) / 2 > 1", "filter_division", "error", "3.0 / 2 is 1.5"),
    ("record.id > 100 && record.status + 1 == 2", "filter_type", "error", "CEL has no + for a text and an integer"),
    ("record.status + record.id == 'x'", "filter_type", "error", "Write `string(record.id)` instead of `record.id`."),
    ("record.status * 2 > 1", "filter_type", "error", "Write `double(record.status)` instead of `record.status`"),
    ("record.paid + 1 > 1", "filter_type", "error", "CEL has no + for a boolean and an integer"),
    ("record.at - record.d > 1", "filter_type", "error", "CEL has no - for a text and a text"),
    ("record.id > 100 && record.status > record.id", "filter_type", "error", "a text cannot be compared with an integer"),
    ("record.status == record.p", "filter_type", "error", "is never true on rows of public.orders"),
    ("record.id + 1 > 'x'", "filter_type", "error", "an integer cannot be compared with a text"),
    ("10 / record.id > 1", "filter_value", "warning", "fails where id of public.orders is 0"),
    ("record.amount * 1.5 > 1", "filter_null", "warning", "record.amount * 1.5: CEL has no * for null"),
    ("record.u == 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'", "filter_form", "warning", "Write 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"),
    ("record.u in ['{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}']", "filter_form", "warning", "this is never true"),
    ("record.d == '31.01.2026'", "filter_form", "warning", "date is written as '2026-01-31'"),
    ("record.at != '2026-01-31 09:30:00+00'", "filter_form", "warning", "this is always true"),
])  # fmt: skip
def test_what_does_not_work_is_said_beforehand(source: str, code: str, severity: str, said: str) -> None:
    (problem,) = found(source)
    assert (problem.code, problem.severity) == (code, severity)
    assert said in problem.message + " " + problem.fix


def test_a_division_inside_a_document_is_warned_of() -> None:
    problems = found(
        "type(record.extra) == type({}) && has(record.extra.n) && record.extra.n != null && record.extra.n / 2 > 1"
    )
    assert [(p.code, p.severity) for p in problems] == [("filter_division", "warning")]
