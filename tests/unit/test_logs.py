"""The log for people has no Python in it; the log for programs keeps its types."""

from __future__ import annotations

import datetime as dt
import json

import pytest
import structlog

from cdcbridge.changes.position import START, Position
from cdcbridge.logs import configure
from cdcbridge.words import as_given, as_text, did_you_mean, one_of


@pytest.fixture(autouse=True)
def _restored() -> object:
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"), (False, "no"), (None, "-"), (3, "3"), (1.0, "1"), (0.25, "0.25"), ("a b", "a b"), ("", ""),
        ((), "-"), (("billing",), "billing"), (["a", "b"], "a, b"), ([None, True, ("x",)], "-, yes, [x]"), ({}, "-"),
        ({"exclude": ["a", "b"], "of": None}, "exclude: [a, b], of: -"), ([{"a": 1}], "{a: 1}"),
        (Position(0x16B374D848, 3), "16/B374D848#3"), (Position(5, -1), "0/5"), (START, "0/0"),
        (dt.datetime(2026, 5, 1, 12, 0, 1, 5, dt.UTC), "2026-05-01 12:00:01 UTC"),
    ],
)  # fmt: skip
def test_a_value_for_people(value: object, text: str) -> None:
    assert as_text(value) == text


def test_a_record_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure("text", "info")
    structlog.get_logger().info(
        "consumers.applied", added=("billing", "audit"), changed=(), not_in_file=["old"], failover=True, of=None,
        position=Position(5, -1), error="one\n  two", sql="set x = 'it''s' in \"t\"", retry_in_seconds=0.5,
    )  # fmt: skip
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "consumers.applied" in line
    assert (
        "failover=yes" in line
        and "not_in_file=old" in line
        and "position=0/5" in line
        and "retry_in_seconds=0.5" in line
    )
    assert 'added="billing, audit"' in line and "sql=\"set x = 'it''s' in \"t\"\"" in line
    assert "one; two" in line and "changed" not in line and "of=" not in line
    assert not any(mark in line for mark in ("('", "[]", "True", "None", "\\n", "#-1"))


def test_a_record_for_programs_keeps_its_types(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json", "info")
    structlog.get_logger().info("consumers.applied", added=("billing",), changed=(), failover=True)
    record = json.loads(capsys.readouterr().err)
    assert (record["added"], record["changed"], record["failover"]) == (["billing"], [], True)


def test_words() -> None:
    assert one_of(["a"]) == "a" and one_of(["a", "b"]) == "a or b" and one_of(["a", "b", "c"]) == "a, b or c"
    assert did_you_mean("modde", ["mode", "tables"]) == "; did you mean mode?"
    assert did_you_mean("zzz", ["mode"]) == "" and did_you_mean("mode", ["mode"]) == ""
    assert [as_given(v) for v in (None, True, "x", 5, ["a"], {"k": None})] == [
        "nothing", "true", "'x'", "5", "['a']", "{k: nothing}",
    ]  # fmt: skip
