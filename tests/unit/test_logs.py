"""The log for people has no Python in it; the log for programs keeps its types."""

from __future__ import annotations

import json

import pytest
import structlog

from cdcbridge.changes.position import Position
from cdcbridge.logs import configure


@pytest.fixture(autouse=True)
def _restored() -> object:
    yield
    structlog.reset_defaults()


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
