"""Columns that the file names, against tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cdcbridge.checks.columns import column_problems
from cdcbridge.config import Consumer
from cdcbridge.source.tables import Column, Index, Table


def table(name: str, *columns: str, generated: str = "") -> Table:
    made = tuple(Column(column, "s" if column == generated else "", floating=False) for column in columns)
    return Table("public", name, 1, "r", "p", False, "d", made, ())


CARDS = table("cards", "id", "card", "Größe", "total", "double_total", generated="double_total")
NOTES = table("notes", "id", "body")
KEYED = replace(CARDS, indexes=(Index("cards_pkey", ("id",), True, False, True, True),))


def codes(tables: list[Table], **settings: Any) -> list[tuple[str, str]]:
    consumer = Consumer(name="c", tables=tuple(t.topic for t in tables) or ("public.absent",), **settings)
    return [(p.code, p.fix) for p in column_problems(consumer, tables)]


def masked(mask: dict[str, str], **settings: Any) -> dict[str, Any]:
    return {**settings, "sink": {"type": "file", "path": "/tmp/out.jsonl", "mask": mask}}


@pytest.mark.parametrize("settings", [
    {"key": ["id"]}, {"columns": {"exclude": ["card"]}}, {"columns": {"include": ["id", "Größe"]}},
    {"columns": {"exclude": ["double_total"]}},
])  # fmt: skip
def test_right_names(settings: dict[str, Any]) -> None:
    assert codes([CARDS], **settings) == []


@pytest.mark.parametrize(("settings", "code", "near"), [
    ({"columns": {"exclude": ["crad"]}}, "unknown_column", "card"),
    ({"columns": {"exclude": ["Card"]}}, "unknown_column", "card"),
    ({"columns": {"include": ["id", "größe"]}}, "unknown_column", "Größe"),
    ({"columns": {"include": ["double_total"]}}, "unknown_column", None),
    ({"key": ["idd"]}, "unknown_column", "id"),
    ({"key": ["double_total"]}, "unknown_column", None),
    ({"key": ["nothing_like_it"]}, "unknown_column", None),
])  # fmt: skip
def test_wrong_names(settings: dict[str, Any], code: str, near: str | None) -> None:
    ((found, fix),) = codes([CARDS], **settings)
    assert found == code
    assert near is None or f"Write {near} instead of" in fix


@pytest.mark.parametrize(("settings", "code", "fix"), [
    ({"mask": {"crad": "hash"}}, "unknown_column", "Write card instead of crad."),
    ({"mask": {"double_total": "null"}}, "unknown_column", "Correct sink.mask of the consumer."),
    ({"mask": {"id": "hash"}}, "masked_key", "Set `key` of the consumer to other columns, or remove id from sink.mask."),
    ({"mask": {"card": "last4"}, "key": ["total", "card"]}, "masked_key", "remove card from sink.mask."),
])  # fmt: skip
def test_a_mask_that_would_hide_nothing_or_not_the_key(settings: dict[str, Any], code: str, fix: str) -> None:
    ((found, said),) = codes([KEYED], **masked(**settings))
    assert found == code and fix in said


def test_a_mask_of_one_of_the_tables() -> None:
    assert codes([KEYED, NOTES], **masked({"card": "hash"})) == []
    assert codes([KEYED], **masked({"id": "hash"}, key=["total"])) == []
    assert codes([CARDS], **masked({"id": "hash"})) == [], "without an index, its messages have no key"


def test_several_tables() -> None:
    assert codes([CARDS, NOTES], columns={"exclude": ["card"]}) == []
    assert codes([CARDS, NOTES], columns={"include": ["body", "id"]}) == []
    ((code, _),) = codes([CARDS, NOTES], key=["card"])  # notes would have null keys
    assert code == "unknown_column"


def test_a_wildcard_without_tables_yet() -> None:
    assert codes([], key=["whatever"]) == []
