"""Filters against tables, as the catalogue has them."""

from __future__ import annotations

from typing import Any

import pytest

from cdcbridge.checks.filters import filter_problems
from cdcbridge.config import Consumer
from cdcbridge.problem import Problem
from cdcbridge.source.tables import Column, Table

COLUMNS = (
    Column("id", "", False, "integer", "number", nullable=False),
    Column("status", "", False, "text", "text", nullable=False),
    Column("amount", "", True, "numeric", "number"),
    Column("state", "", False, "state", "text", labels=("open", "paid")),
    Column("paid", "", False, "boolean", "boolean"),
    Column("tags", "", False, "text[]", "list"),
    Column("extra", "", False, "jsonb", "any"),
    Column("at", "", False, "timestamp with time zone", "text", nullable=False),
    Column("code", "", False, "character(5)", "text"),
    Column("double", "s", False, "integer", "number"),
)


def table(name: str, *columns: Column, full: bool = False) -> Table:
    return Table("public", name, hash(name), "r", "p", False, "f" if full else "d", columns, ())


ORDERS = table("orders", *COLUMNS)
NOTES = table("notes", COLUMNS[0], Column("body", "", False, "text", "text"))


def found(source: str, *tables: Table, **settings: Any) -> list[Problem]:
    tables = tables or (ORDERS,)
    given: dict[str, Any] = {"tables": tuple(t.topic for t in tables), **settings}
    return list(filter_problems(Consumer(name="c", filter=source, **given), tables))


@pytest.mark.parametrize("source", [
    "record.status == 'paid'", "'paid' == record.status", "record.id > 5 && op != 'delete'", "record['status'] in ['a', 'b']",
    "op == 'read' || op in ['insert', 'update']", "record.tags != null && size(record.tags) > 0", "record.amount == null",
    "record.amount != null && record.amount >= 9.5", "record.state == 'paid'", "record.paid == true",
    "record.extra == 'x'", "record.extra != null", "type(record.extra) == type({}) && has(record.extra.a) && record.extra.a == 1",
    "type(record.extra) == type([]) && size(record.extra) > 0", "timestamp(record.at) > timestamp('2025-01-01T00:00:00Z')", "int(record.status) > 5",
    "record.status.startsWith('p')", "record.tags == null || record.tags.exists(t, t == 'x')", "record.code == 'ab   '", "true", "record.id + 1 == 2",
    "record.status + 'x' == 'px'", "old != null && old.status != record.status", "topic == 'public.orders'", "record.id == -1",
    "record.status.matches('^p') ? op == 'insert' : false", "string(record.id) == '5'", "'#' == record.status + '#'",
    "record.status == 'a' ? true : record.id == 5", "meta.table == 'orders' && meta.xid > 0",
])  # fmt: skip
def test_what_can_work_is_let_through(source: str) -> None:
    assert found(source) == []


@pytest.mark.parametrize(("source", "code", "said"), [
    ("record.statsu == 'paid'", "filter_column", "Write status instead of statsu."),
    ("record['Status'] == 'paid'", "filter_column", "Write status instead of Status."),
    ("has(record.nothing_like_it)", "filter_column", "The columns are amount, at"),
    ("record.double > 5", "filter_column", "is a generated column"),
    ("record.id == '5'", "filter_type", "Write 5 instead of '5'."),
    ("'5' < record.id", "filter_type", "every row becomes a dead letter"),
    ("record.amount >= '9.5'", "filter_type", "amount of public.orders is numeric, a number"),
    ("record.status == 5", "filter_type", "Write '5' instead of 5."),
    ("op == 'insert' && record.status in ['paid', 5]", "filter_type", "this is never true"),
    ("record.paid == 'true'", "filter_type", "Write true instead of 'true'."),
    ("record.tags == 'x'", "filter_type", "this is never true"),
    ("old.id != 'x'", "filter_type", "this is always true"),
    ("record.at > 5", "filter_type", "timestamp with time zone"),
    ("record.state == 'payd'", "filter_label", "Write 'paid' instead of 'payd'."),
    ("record.code == 'ab'", "filter_padding", "Write 'ab   ' instead of 'ab'."),
    ("op == 'INSERT'", "filter_op", "Write 'insert' instead of 'INSERT'."),
    ("op in ['insert', 'upsert']", "filter_op", "which no change has"),
    ("op == 'message'", "filter_op", "An op is one of"),
    ("record.status", "filter_no_boolean", "the filter gave str"),
    ("record.id + 1", "filter_no_boolean", "not true or false"),
    ("'paid'", "filter_no_boolean", "'paid'"),
    ("op == 'update' ? record.id : true", "filter_no_boolean", "dead letter"),
    ("!record.status", "filter_fails", "!record.status: ! needs true or false, and not a text"),
    ("record.at > timestamp('2025-01-01T00:00:00Z')", "filter_fails", "write `timestamp(record.at)`"),
    ("record.id.startsWith('5')", "filter_fails", "startsWith"),
    ("meta.lsn > '0/1'", "filter_fails", "no such field: lsn"),
])  # fmt: skip
def test_what_cannot_work_is_an_error(source: str, code: str, said: str) -> None:
    (problem,) = found(source)
    assert (problem.code, problem.severity) == (code, "error")
    assert said in problem.message + problem.fix


@pytest.mark.parametrize(("source", "code"), [
    ("record.amount > 5", "filter_null"),
    ("'x' in record.tags", "filter_null"),
    ("has(record.tags) && size(record.tags) > 0", "filter_null"),
    ("topic == 'orders'", "filter_name"),
    ("meta.table == 'order'", "filter_name"),
])  # fmt: skip
def test_what_may_be_meant_is_a_warning(source: str, code: str) -> None:
    (problem,) = found(source)
    assert (problem.code, problem.severity) == (code, "warning")


@pytest.mark.parametrize(("source", "fails_on", "fix"), [
    ("record.extra.vip == true", "null, {} or []", "type(record.extra) == type({}) && has(record.extra.vip) && record.extra.vip == true"),
    ("record.extra['v-p'] == 'x'", "null, {} or []", "type(record.extra) == type({}) && 'v-p' in record.extra && record.extra['v-p'] == 'x'"),
    ("record.extra.b.c == 1", "null, {} or []",
     "type(record.extra) == type({}) && has(record.extra.b) && type(record.extra.b) == type({}) && has(record.extra.b.c) && record.extra.b.c == 1"),
    ("record.extra.n > 5", 'null, {}, [] or {"n": null}',
     "type(record.extra) == type({}) && has(record.extra.n) && record.extra.n != null && record.extra.n > 5"),
    ("has(record.extra.vip) && record.extra.vip", 'null, [] or {"vip": null}',
     "type(record.extra) == type({}) && has(record.extra.vip) && record.extra.vip != null && has(record.extra.vip) && record.extra.vip"),
    ("record.status == 'paid' && record.extra.vip == true", "null, {} or []",
     "type(record.extra) == type({}) && has(record.extra.vip) && record.status == 'paid' && record.extra.vip == true"),
    ("record.status == 'paid' || record.extra.vip == true", "null, {} or []",
     "(type(record.extra) == type({}) && has(record.extra.vip) && record.extra.vip == …)"),
    ("record.extra.tags.exists(t, t == 'x')", 'null, {}, [] or {"tags": null}', "has(record.extra.tags)"),
    ("record.extra[0] == 'x'", "null, {} or []", "record.extra != null && …"),
])  # fmt: skip
def test_documents_that_a_filter_fails_on_are_warned_of(source: str, fails_on: str, fix: str) -> None:
    (problem,) = found(source)
    assert (problem.code, problem.severity) == ("filter_null", "warning")
    assert f"extra of public.orders is {fails_on}, and the row becomes a dead letter" in problem.message
    assert fix in problem.fix
    if f"`{fix}`" in problem.fix and "…" not in fix:
        assert found(fix) == [], "what the fix says gives no warning itself"


def test_a_document_that_is_never_null_may_still_be_empty() -> None:
    orders = table("orders", COLUMNS[0], Column("extra", "", False, "jsonb", "any", nullable=False))
    (problem,) = found("record.extra.vip == true", orders)
    assert "is {} or [], and" in problem.message


def test_a_table_that_lacks_the_column_loses_every_row() -> None:
    assert [(p.code, p.severity, p.object) for p in found("record.body == 'x'", ORDERS, NOTES)] == [
        ("filter_fails", "error", "public.orders")
    ]
    # A wildcard may cover such a table at any time: the others go on.
    assert [p.severity for p in found("record.body == 'x'", ORDERS, NOTES, tables=("public.*",))] == ["warning"]
    assert found("meta.table == 'notes' && record.body == 'x'", ORDERS, NOTES) == []
    # Where no table is left, nothing goes on.
    assert [p.severity for p in found("record.id == 'x'", ORDERS, NOTES, tables=("public.*",))] == ["error"] * 2


def test_a_filter_of_published_messages_has_no_effect() -> None:
    (problem,) = filter_problems(Consumer(name="c", topics=("t",), filter="op == 'insert'"), ())
    assert (problem.code, problem.severity) == ("filter_unused", "warning")


def test_on_leave_names_tables_that_do_not_tell() -> None:
    (problem,) = found("record.status == 'paid'", on_leave="delete")
    assert (problem.code, problem.severity) == ("on_leave_identity", "warning")
    assert problem.fix == 'alter table "public"."orders" replica identity full;'
    assert found("record.status == 'paid'", table("orders", *COLUMNS, full=True), on_leave="delete") == []
