"""Documents of json columns that make a filter fail, and filters that do not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cdcbridge.checks.documents import failing_documents
from cdcbridge.routing.filters import Filter, FilterError


def fails(source: str, document: Any) -> bool:
    row = {"op": "insert", "topic": "t", "key": "1", "record": {"meta": document, "n": 1}, "old": None, "meta": {}}
    try:
        Filter(source).wants(row)
    except FilterError:
        return True
    return False


def found(source: str, *, nullable: bool = True) -> tuple[tuple[str, ...], str] | None:
    return failing_documents(source, "meta", nullable=nullable, literals=(), fails=fails)


@pytest.mark.parametrize(
    ("source", "documents"),
    [
        ("record.meta.vip == true", ("null", "{}", "[]")),
        ("record.meta.age > 3", ("null", "{}", "[]", '{"age": null}')),
        ("record.meta['first name'] == 'x'", ("null", "{}", "[]")),
        ("record.meta.a.b == 1", ("null", "{}", "[]")),
        ("record['meta'].vip == true", ("null", "{}", "[]")),
        ("record.meta[0] == 1", ("null", "{}", "[]")),
    ],
)
def test_documents_that_fail(source: str, documents: tuple[str, ...]) -> None:
    failing = found(source)
    assert failing is not None and failing[0] == documents
    not_null = found(source, nullable=False)
    assert not_null is not None and not_null[0] == documents[1:]


@pytest.mark.parametrize(
    "source",
    [
        "record.n == 1",
        "record.meta != null",
        "has(record.other.vip)",
        "type(record.meta) == type({}) && has(record.meta.vip) && record.meta.vip == true",
        "int(record.meta.vip) > size(record.meta.vip)",  # no document works at all: another finding tells so
    ],
)
def test_filters_of_which_nothing_is_said(source: str) -> None:
    assert found(source) is None


@pytest.mark.parametrize(
    "source",
    ["record.meta.vip == true", "record.meta.age > 3", "record.meta['first name'] == 'x'", "record.meta.a.b == 1"],
)
def test_the_filter_of_the_fix_works_on_all_of_them(source: str) -> None:
    failing = found(source)
    assert failing is not None
    written = re.fullmatch(r"Write `(.*)`\.", failing[1])
    assert written, failing[1]
    documents: list[Any] = [None, {}, [], {"vip": None}, {"age": None}, {"a": None}, {"a": {"b": None}}, "x", 1]
    for document in documents:
        assert not fails(written[1], document), document


def test_beside_an_or_the_fix_is_for_the_part_alone() -> None:
    assert found("record.n == 1 || record.meta.vip == true") is None, "true whatever the document is"
    failing = found("record.n == 2 || record.meta.vip == true")
    assert failing is not None and failing[1].startswith(
        "Write `(type(record.meta) == type({}) && has(record.meta.vip)"
    )
