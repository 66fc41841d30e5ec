"""Named instants: nothing happens without a listener, and each thing of a stream is told before and after."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cdcbridge.instants import INSTANTS, AnyInstant, listen, reach, reach_each


@pytest.fixture
def told() -> Iterator[list[str]]:
    found: list[str] = []
    listen(found.append)
    yield found
    listen(None)


def test_without_a_listener_a_stream_is_the_object_that_was_given() -> None:
    things = iter([1, 2])
    assert reach_each("received", things) is things
    reach("committed")  # and this does nothing


def test_a_stream_is_told_thing_by_thing(told: list[str]) -> None:
    told.extend(reach_each("decoded", ["a", "b"], "collected"))
    assert told == ["decoded", "a", "collected", "decoded", "b", "collected"]


def test_each_instant_has_one_name(told: list[str]) -> None:
    for instant in INSTANTS:
        reach(instant)
    assert told == list(INSTANTS) and len(set(told)) == len(told)


def test_what_a_listener_raises_ends_the_step() -> None:
    def stop(_instant: AnyInstant) -> None:
        raise KeyboardInterrupt

    listen(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            reach("committed")
    finally:
        listen(None)
