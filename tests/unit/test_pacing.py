"""When a session appends, confirms, looks and waits: rules of sizes and times. Needs no server and no clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.bridge.pacing import BATCH_BYTES, BATCH_ROWS, LOOK_INTERVAL, Load, Pacing
from cdcbridge.changes.position import Progress

LOADS = st.builds(
    Load,
    rows=st.integers(0, 3 * BATCH_ROWS),
    size=st.integers(0, 3 * BATCH_BYTES),
    open=st.booleans(),
    waiting=st.booleans(),
    drained=st.booleans(),
    spilling=st.booleans(),
    moved=st.booleans(),
)
IDLE = 10.0  # seconds, the heartbeat interval


def pacing(timeout: float = 60.0) -> Pacing:
    made = Pacing(IDLE, timeout)
    made.note_submitted(100.0)
    made.note_confirmed(500, 100.0)
    return made


@pytest.mark.parametrize(
    ("load", "due"),
    [
        (Load(), False),
        (Load(rows=1, waiting=True), True),  # nothing follows it just now
        (Load(rows=1, waiting=True, drained=False), False),  # more has arrived already
        (Load(rows=1, waiting=True, open=True), False),  # the rest of its transaction follows
        (Load(rows=BATCH_ROWS, waiting=True, open=True, drained=False), True),
        (Load(rows=BATCH_ROWS - 1, waiting=True, open=True, drained=False), False),
        (Load(size=BATCH_BYTES, waiting=True, open=True, drained=False), True),
        (Load(size=BATCH_BYTES - 1, waiting=True, open=True, drained=False), False),
        (Load(spilling=True, open=True), True),  # nothing more is read before its blocks are stored
        (Load(moved=True), False),  # the heartbeat's time has not come
    ],
)
def test_when_an_append_is_due(load: Load, due: bool) -> None:
    assert pacing().append_due(load, 101.0) is due


@pytest.mark.parametrize(
    ("load", "due"),
    [
        (Load(moved=True), True),
        (Load(moved=False), False),  # an append would say what the store says already
        (Load(moved=True, open=True), False),  # the position is inside a transaction
        (Load(moved=True, waiting=True, drained=False), False),  # it goes with the rows
    ],
)
def test_a_position_that_moved_alone_is_appended_now_and_then(load: Load, due: bool) -> None:
    assert pacing().append_due(load, 100.0 + IDLE) is due
    assert not pacing().append_due(load, 100.0 + IDLE - 0.001)


@pytest.mark.parametrize(
    ("load", "full"),
    [
        (Load(rows=2 * BATCH_ROWS - 1, size=2 * BATCH_BYTES - 1), False),
        (Load(rows=2 * BATCH_ROWS), True),
        (Load(size=2 * BATCH_BYTES), True),
    ],
)
def test_reading_stops_at_two_batches(load: Load, full: bool) -> None:
    assert load.full is full


@pytest.mark.parametrize(("timeout", "interval"), [(0.0, 1.0), (60.0, 1.0), (4.0, 1.0), (2.0, 0.5), (0.1, 0.025)])
def test_status_updates_come_in_time_for_the_servers_timeout(timeout: float, interval: float) -> None:
    made = pacing(timeout)
    assert made.status_interval == interval
    assert not made.confirm_due(500, 100.0 + interval * 0.99, wanted=False)
    assert made.confirm_due(500, 100.0 + interval, wanted=False)


def test_a_status_update_is_due_at_once() -> None:
    made = pacing()
    assert made.confirm_due(500, 100.1, wanted=True), "the server asked for it"
    assert made.confirm_due(501, 100.1, wanted=False), "more is written"
    assert not made.confirm_due(500, 100.1, wanted=False)
    made.note_stored(chunks=False, now=100.2)
    assert made.confirm_due(500, 100.2, wanted=False), "an append is durable"


def test_backfills_are_gentle_for_a_second_after_a_change() -> None:
    made = pacing()
    assert not made.gentle(100.0) and made.chunk_due(100.0), "there was no change yet"
    made.note_changes(0, 100.0)
    assert not made.gentle(100.0)
    made.note_changes(3, 100.0)
    made.note_changes(3, 100.9)  # the same three
    assert made.gentle(100.99) and not made.gentle(101.0)


def test_a_chunk_goes_with_changes_that_leave_no_time_between_them() -> None:
    made = pacing()
    made.note_changes(1, 100.0)
    made.note_stored(chunks=True, now=100.0)
    assert not made.chunk_due(100.1) and made.chunk_due(100.11)
    made.note_stored(chunks=False, now=100.2)
    assert made.chunk_due(100.2), "only an append with a chunk counts"


def test_looks_are_rare_and_needless_ones_are_left_out() -> None:
    made, progress = pacing(), Progress(received=50, durable=40, vouched=40, confirmed=40)
    assert made.look_due(progress, 100.0, ending=False)
    made.note_look(50, 100.0)
    assert not made.look_due(progress, 200.0, ending=True), "nothing came since"
    progress.stored(50)
    assert not made.look_due(progress, 100.0 + LOOK_INTERVAL - 0.001, ending=False)
    assert made.look_due(progress, 100.0 + LOOK_INTERVAL, ending=False)
    assert made.look_due(progress, 100.0, ending=True), "the last one is not put off"


@given(load=LOADS, appending=st.booleans(), now=st.floats(90.0, 200.0))
def test_a_wait_ends_when_something_is_due(load: Load, appending: bool, now: float) -> None:
    wait = pacing().longest_wait(load, now, appending=appending)
    until_status, until_append = max(0.0, 101.0 - now), max(0.01, 100.0 + IDLE - now)
    free = not (appending or load.full or load.spilling)
    assert wait == (min(until_status, until_append) if free else until_status)


@given(load=LOADS, now=st.floats(90.0, 200.0))
def test_a_question_changes_nothing(load: Load, now: float) -> None:
    made, progress = pacing(), Progress(9, 5, 5, 5)
    before = dict(vars(made))
    made.gentle(now), made.chunk_due(now), made.append_due(load, now), made.confirm_due(5, now, wanted=False)
    made.look_due(progress, now, ending=False), made.longest_wait(load, now, appending=False)
    assert vars(made) == before
