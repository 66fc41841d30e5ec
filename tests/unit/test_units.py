"""Durations and sizes, as people write and read them."""

from __future__ import annotations

import pytest

from cdcbridge.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text_", "seconds"), [("500ms", 0.5), ("30s", 30), ("10m", 600), ("2h", 7200), ("7d", 604800)]
)
def test_durations(text_: str, seconds: float) -> None:
    assert parse_duration(text_) == seconds
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize("bad", ["30", "s", "-1s", "1 year", "", None, 30, "1e3s"])
def test_bad_durations_are_named(bad: object) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(bad)


@pytest.mark.parametrize(("text_", "size"), [("1kB", 1024), ("10GB", 10 << 30), ("1.5MB", 3 << 19), (7, 7), ("5B", 5)])
def test_sizes_count_as_in_postgresql(text_: object, size: int) -> None:
    assert parse_size(text_) == size
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("bad", ["1", "1KB", "1gb", -1, True, None])
def test_bad_sizes_are_named(bad: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(bad)
