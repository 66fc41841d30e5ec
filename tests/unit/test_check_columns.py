"""Columns that the file names, against tables."""

from __future__ import annotations

from typing import Any

import pytest

from cdcbridge.checks.columns import column_problems
from cdcbridge.config import Consumer
from cdcbridge.source.tables import Column, Table


def table(name: str, *columns: str, generated: str = "") -> Table:
    made = tuple(Column(column, "s" if column == generated else "", floating=False) for column in columns)
    return Table("public", name, 1, "r", "p", False, "d", made, ())


CARDS = table("cards", "id", "card", "Größe", "total", "double_total", generated="double_total")
NOTES = table("notes", "id", "body")


def codes(tables: list[Table], **settings: Any) -> list[tuple[str, str]]:
    consumer = Consumer(name="c", tables=tuple(t.topic for t in tables) or ("public.absent",), **settings)
    return [(p.code, p.fix) for p in column_problems(consumer, tables)]


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


def test_several_tables() -> None:
    assert codes([CARDS, NOTES], columns={"exclude": ["card"]}) == []
    assert codes([CARDS, NOTES], columns={"include": ["body", "id"]}) == []
    ((code, _),) = codes([CARDS, NOTES], key=["card"])  # notes would have null keys
    assert code == "unknown_column"


def test_a_wildcard_without_tables_yet() -> None:
    assert codes([], key=["whatever"]) == []
