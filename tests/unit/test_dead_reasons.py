"""The words before the colon, which people search for, never change."""

from __future__ import annotations

from cdcbridge.routing.dead_reasons import filter_error, not_loaded, oversized, undecodable


def test_each_reason_begins_with_its_word() -> None:
    assert oversized(12, 10) == "oversized: data has 12 bytes, max_message_bytes is 10"
    assert not_loaded(12, 10).startswith("oversized: data has at least 12 bytes, max_message_bytes is 10: ")
    assert filter_error(ValueError("no such key: status")) == "filter_error: no such key: status"
    assert undecodable("key is a number") == "undecodable: key is a number"
