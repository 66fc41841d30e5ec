"""Durations and sizes, as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.units import (
    format_duration,
    format_size,
    human_duration,
    human_size,
    parse_duration,
    parse_size,
)


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


@given(st.integers(0, 10**9))
def test_what_is_written_is_read_again(n: int) -> None:
    assert parse_size(format_size(n)) == n
    assert parse_duration(format_duration(n / 1000)) == pytest.approx(n / 1000)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (0.25, "250 ms"), (1, "1.0 s"), (59.94, "59.9 s"), (60, "1m 0s"), (3661, "1h 1m"), (93784, "1d 2h")],
)
def test_a_duration_for_people(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 kB"), (10 << 30, "10.0 GB"), (1 << 50, "1024.0 TB"), (-2048, "-2.0 kB")],
)
def test_a_size_for_people(size: int, text: str) -> None:
    assert human_size(size) == text


@pytest.mark.parametrize("text", ["36501d", "999999999999999d"])
def test_a_duration_that_postgresql_cannot_add_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is longer than 36500d"):
        parse_duration(text)
