"""Errors of filters in words: what to write instead, and which values a filter failed on."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from cdcbridge.config import Consumer
from cdcbridge.routing.filter_words import function_words, syntax_words, variable_words
from cdcbridge.routing.filters import Filter, FilterError, natives, tokens_of
from cdcbridge.routing.judged import Logged
from cdcbridge.routing.router import OPERATIONS
from cdcbridge.routing.subscription import Subscription
from cdcbridge.routing.verdict import Bury, Pass, Take, verdict


@pytest.mark.parametrize(("source", "said"), [
    ("record.status = 'paid'", "write == to compare: record.status == 'paid' (column 15)"),
    ("record['a'] = 1", "write == to compare: record['a'] == 1 (column 13)"),
    ("op == 'insert' &&\nrecord.b = record.c", "write == to compare: record.b == record.c"),
    ("record.a === 1", "write == instead of === (column 12)"),
    ("record.a !== 1", "write != instead of !== (column 12)"),
    ("record.a => 1", "write >= instead of => (column 10)"),
    ("record.a =< 1", "write <= instead of =< (column 10)"),
    ("record.a == 1 AND record.b == 2", "write && instead of AND (column 15)"),
    ("record.a == 'x or y' or record.b == 2", "write || instead of OR (column 22)"),
    ("NOT record.a == 1", "write !(record.a) instead of NOT (column 1)"),
    ("record.a == 1 & record.b == 2", "write && instead of & (column 15)"),
    ("record.a == 1 | record.b == 2", "write || instead of | (column 15)"),
    ("record.a is null", "write record.a == null instead of IS NULL (column 10)"),
    ("record.a IS NOT NULL", "write record.a != null instead of IS NOT NULL (column 10)"),
    ("record.a <> 1", "write != instead of <>: record.a != … (column 10)"),
    ("record.a in ('x', 'y')", "write record.a in ['a', 'b']: a list has square brackets (column 10)"),
    ("record.a IN ['x']", "write in instead of IN (column 10)"),
    ("'x' in ...", "'..' is not expected at column 9"),
    ("record.a like 'x%'", "write record.a.startsWith('x'), .endsWith('x'), .contains('x') or .matches('regex') instead of LIKE"),
    ("record.a between 1 and 9", "write record.a >= 1 && record.a <= 9 instead of BETWEEN"),
    ("record.a == 'rock and roll", "the quote ' at column 13 is not closed"),
    ('record.a == "x', 'the quote " at column 13 is not closed'),
    ("record.a == 'it''s'", "write a quote inside a text as \\'"),
    ("record.a == 1;", "a filter is one expression: leave out the semicolon"),
    ("(record.a == 1", "the filter has 1 ( more than )"),
    ("record.a in [1]]", "the filter has 1 ] more than ["),
    ("record.a ==", "the filter ends too early, at column 12"),
    ("", "the filter is empty"),
    ("record.first name == 1", "'name' is not expected at column 14"),
    ("status == 'paid'", "A column is record.status"),
    ("record.a == NULL", "unknown variable 'NULL': write null"),
    ("record.a == True", "unknown variable 'True': write true"),
    ("lower(record.a) == 'x'", "CEL has no lower()"),
    ("length(record.a) > 1", "write size(…) instead of length(…)"),
    ("record.and == 1 AND true", "write && instead of AND (column 17)"),
])  # fmt: skip
def test_what_to_write_instead(source: str, said: str) -> None:
    with pytest.raises(ValueError) as raised:
        Filter(source)
    text = str(raised.value)
    assert said in text
    assert "token recognition" not in text and "expecting {" not in text and "\n" not in text
    with pytest.raises(ValidationError) as refused:  # and so says the configuration's error
        Consumer(name="c", tables=("public.t",), filter=source)
    assert said in str(refused.value)


@example("record.a = '''x\ny'''", "")
@given(st.text(alphabet="recod.a=<>!&|()[]'\"; \n1?isnotlike"), st.text())
def test_words_are_found_for_every_text_and_every_error(source: str, error: str) -> None:
    said = syntax_words(source, tokens_of(source), error)
    assert said == "" or len(said.splitlines()) == 1


@pytest.mark.parametrize(("name", "said"), [
    ("status", "unknown variable 'status'. A filter knows key, op. A column is record.status"), ("nil", "unknown variable 'nil': write null"),
])  # fmt: skip
def test_a_variable_that_no_filter_has(name: str, said: str) -> None:
    assert variable_words(name, ["key", "op"]) == said


def test_a_function_that_cel_does_not_have() -> None:
    assert function_words("COALESCE").startswith("unknown function 'COALESCE': write `record.a != null ? record.a : 0`")
    assert function_words("frobnicate") == "unknown function 'frobnicate'"


@pytest.mark.parametrize("source", [
    "record.and == 1", "record.status == 'a = b and c is <> d;'", "record['is'] == 'it\\'s'", "record.a == \"it's (\"", "record.or.not == 1",
    "record.a <= 1 && record.a >= 0", "record.a in ['(', ')']", "(record.a) in [1]",
])  # fmt: skip
def test_what_is_cel_is_taken(source: str) -> None:
    Filter(source)


@pytest.mark.parametrize(("source", "row", "said"), [
    ("record.a > 1", {"a": "x"}, 'record.a > 1: a text cannot be compared with an integer. Write double(record.a) (record.a is the text "x")'),
    ("record.a > record.b", {"a": 1, "b": None}, "(record.a is the number 1, record.b is null)"),
    ("record['a'] > 1", {"a": True}, "(record.a is the boolean true)"),
    ("record.meta.vip", {"meta": []}, "a list was read by a name, like an object (record.meta is the list [])"),
    ("record.meta.vip", {"meta": {}}, "no such field: vip (record.meta is the object {})"),
    ("record.meta.vip", {"meta": None}, "(record.meta is null)"),
    ("record.state == 1", {"status": 1}, "no such field: state"),
    ("record.a.startsWith('x')", {"a": None}, "Undefined variable or function: 'startsWith', of a value of this type (record.a is null)"),
    ("int(record.a) > 1", {"a": "x" * 100}, 'invalid digit found in string (record.a is the text "' + "x" * 59 + "…)"),
])  # fmt: skip
def test_a_reason_names_the_values(source: str, row: dict[str, Any], said: str) -> None:
    with pytest.raises(FilterError) as raised:
        Filter(source).wants({"op": "insert", "topic": "t", "key": "1", "record": row, "old": None, "meta": {}})
    assert str(raised.value).endswith(said) and "\n" not in str(raised.value)


ROW = '{"s": "paid", "big": 1e400, "deep": {"n": [-1e999]}}'


@pytest.mark.parametrize(("source", "kind"), [
    ("record.s == 'paid'", Take), ("record.s == 'open'", Pass), ("!has(record.nothing)", Take), ("op == 'insert'", Take),
    ("record.big > 1", None), ("has(record.big)", None), ("'s' in record", None), ("record.deep.n == 1", None),
    ("record.s == 'paid' || record.big > 1", None),
])  # fmt: skip
def test_json_that_cel_cannot_hold_matters_where_the_filter_reads_it(source: str, kind: type | None) -> None:
    text = f'{{"op":"insert","record":{ROW},"old":null,"unchanged":[]}}'
    wanted = Subscription(1, "c", ("public.t",), frozenset(OPERATIONS), Filter(source))
    said = verdict(wanted, Logged(text, "public.t", "1", None, None, None))
    assert isinstance(said, kind or Bury)
    if isinstance(said, Bury):
        assert re.match(
            r"filter_error: a value that CEL cannot hold: record\.(big|deep): number is infinity", said.reason
        )


def test_rows_of_the_wal_are_read_in_the_same_way() -> None:
    import orjson

    row = natives({"s": "paid", "big": orjson.Fragment("1e400"), "n": orjson.Fragment("1.50")})
    assert row == {"s": "paid", "n": 1.5} and list(row.unreadable) == ["big"]
    assert natives(None) is None and type(natives({"s": 1})) is dict
