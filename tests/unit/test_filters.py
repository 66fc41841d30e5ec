"""Filters: what they decide, and what fails or is refused."""

from __future__ import annotations

import pytest

from cdcbridge.routing.filters import Filter, FilterError

COMPLETE = {"op": "insert", "topic": "public.t", "key": "1", "record": {"a": 1, "s": "paid"}, "old": None, "meta": {}}


def wants(source: str, *unchanged: str, **changed: object) -> bool:
    return Filter(source).wants({**COMPLETE, **changed}, unchanged)


@pytest.mark.parametrize("source", [
    "record.tags[0] == 'x'", "record.tags[-1] == 'x'", "record.absent == 1", "int(record.s) > 0", "record.a / 0 > 1",
    "record[record.s] == 2", "record.s.matches(record.s)", "record.s", "timestamp(record.s) > timestamp(record.s)",
    "duration(record.s) > duration('1s')", "record.big * record.big > 0", "record.a.map(x, x.y) == []",
])  # fmt: skip
def test_a_filter_that_fails_says_so_in_a_text_that_postgresql_takes(source: str) -> None:
    record = {"a": 1, "s": "(\0", "tags": [], "big": 1 << 62}
    with pytest.raises(FilterError) as raised:
        wants(source, record=record)
    assert "\0" not in str(raised.value)


def test_a_filter_decides_on_what_is_there() -> None:
    assert wants("record.s == 'paid' && op in ['insert', 'update']")
    assert not wants("record.s == 'open'")
    assert wants("record.a > 0.5") and wants("key == '1'") and wants("topic.startsWith('public.')")
    assert wants("old == null") and not wants("has(record.nothing)")


def test_a_filter_that_reads_what_the_wal_did_not_carry_delivers() -> None:
    update = {"op": "update", "record": {"a": 1}}
    assert wants("record.s == 'paid'", "s", **update)
    assert wants("has(record.s)", "s", **update)
    assert wants("'s' in record", "s", **update)
    assert wants("has(record.s) && record.s == 'x'", "s", **update)
    assert not wants("record.a == 2 && record.s == 'paid'", "s", **update), "false whatever s is"
    assert wants("record.s == 'paid'", op="delete", record={"a": 1})
    assert not wants("record.a == 2", op="delete", record={"a": 1})
    assert wants("record.s == 'paid'", op="truncate", record=None)
    assert not wants("op == 'insert'", op="truncate", record=None)
    assert wants("old.s != record.s"), "an insert has no old"


@pytest.mark.parametrize(
    "source", ["record.nothing == 1", "int(record.s) > 1", "record.s > 1", "record.a", "1 / 0 == 1"]
)
def test_a_filter_that_fails_on_values_that_are_there_is_an_error(source: str) -> None:
    with pytest.raises(FilterError):
        wants(source)


@pytest.mark.parametrize("source", ["record.a ==", "rec.a == 1", "nofunction(record.a)", "", "record.a = 1"])
def test_what_is_no_filter_is_refused(source: str) -> None:
    with pytest.raises(ValueError):
        Filter(source)
