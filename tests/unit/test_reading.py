"""What a stream with a sink takes, and what becomes a dead letter."""

from __future__ import annotations

from cdcbridge.sinks.shaper import Unshaped
from tests.harness.shaping import body, row, shaped


def test_a_filter_passes_messages_over() -> None:
    assert shaped(row(), filter="record.id == 8") is None
    assert shaped(row(), filter="record.id == 7") is not None


def test_a_filter_that_fails_makes_a_dead_letter() -> None:
    found = shaped(row(), filter="record.email > 3")
    assert isinstance(found, Unshaped) and found.reason.startswith("filter_error: ")


def test_a_message_that_is_too_large_makes_a_dead_letter() -> None:
    found = shaped(row(), max_message_bytes=20)
    assert isinstance(found, Unshaped) and found.reason.startswith("oversized: ")


def test_a_key_of_its_own_comes_from_the_text_of_the_row() -> None:
    assert body(row(), key=["total"])["key"] == "12345678901234567890.10"
    assert body(row(), key=["id", "email"])["key"] == '["7","a@b.example"]'


def test_only_some_columns_leave() -> None:
    shown = '{"op":"insert","record":{"id":7},"old":null,"unchanged":[]}'
    found = body(row(shown=shown), columns={"include": ["id"]}, filter="record.email != ''")
    assert found["data"]["record"] == {"id": 7}
    assert isinstance(shaped(row(shown=None), columns={"include": ["id"]}), Unshaped)
