"""Positions, and how far things have come."""

from __future__ import annotations

import pytest

from cdcbridge.changes.position import START, Position, Progress, postgres_now
from cdcbridge.changes.wal2json import postgres_microseconds


def test_progress_only_rises_and_never_stores_what_was_not_received() -> None:
    progress = Progress(10, 10, 10, 10)
    progress.receive(20)
    progress.receive(15)
    progress.stored(20)
    progress.stored(12)
    assert progress.confirm() == 10, "nobody has vouched for it"
    progress.vouch(20)
    assert progress.confirm() == 20
    with pytest.raises(ValueError, match="durable only up to"):
        progress.vouch(21)
    with pytest.raises(ValueError, match="received only up to"):
        progress.stored(21)


@pytest.mark.parametrize(
    ("position", "text"),
    [(START, "0/0"), (Position(0x16B374D848, 3), "16/B374D848#3"), (Position(5, 0), "0/5#0"), (Position(5, -2), "0/5")],
)
def test_a_position_is_written_as_its_lsn_and_the_change(position: Position, text: str) -> None:
    assert str(position) == text


def test_positions_are_in_the_order_of_commits_and_then_of_changes() -> None:
    given = [Position(2, -1), Position(1, 5), Position(2, 0), START, Position(1, 10)]
    assert sorted(given) == [START, Position(1, 5), Position(1, 10), Position(2, -1), Position(2, 0)]


def test_the_clock_counts_as_postgresql_does() -> None:
    now = postgres_now()
    assert postgres_microseconds("2026-01-01 00:00:00+00") < now < postgres_microseconds("2100-01-01 00:00:00+00")
