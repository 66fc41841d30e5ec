"""seek and replay to a time: nothing that was committed then or later is missed, whatever the clocks and transactions."""

from __future__ import annotations

import psycopg
import pytest

from tests.sql.queue import Row, StoreQueue


@pytest.fixture
def group(queue: StoreQueue) -> StoreQueue:
    queue.declare("s", mode="stream", tables=("public.t",), topics=("news",))
    return queue


def publish(queue: StoreQueue, session: psycopg.Connection[Row] | None = None) -> int:
    return int(queue.value("select cdcbridge.publish('news', 'k', '1')", session=session))


def now(queue: StoreQueue) -> str:
    return str(queue.value("select clock_timestamp()::text"))


def first_from(queue: StoreQueue, target: str) -> int:
    return int(queue.value("select cdcbridge_internal.seq_before(%s) + 1", target))


def test_what_was_published_before_and_committed_after_is_there(group: StoreQueue) -> None:
    early = publish(group)
    slow = group.open(autocommit=False)
    late = publish(group, slow)
    then = now(group)
    put = publish(group)
    slow.commit()
    group.value("select cdcbridge.seek('s', %s)", then)
    rows = group.all("select seq from cdcbridge.read_stream('s')")
    assert [row["seq"] for row in rows] == [late, put]
    assert early < late, "and what another message shows to be committed before is not read again"


def test_a_safe_point_tells_what_was_committed_by_then(group: StoreQueue) -> None:
    before = publish(group)
    group.value("select cdcbridge_internal.note_safe_point()")
    quiet = now(group)
    after = publish(group)
    assert first_from(group, quiet) == after == before + 1
    slow = group.open(autocommit=False)
    late = publish(group, slow)
    group.value("select cdcbridge_internal.note_safe_point()")
    then = now(group)
    slow.commit()
    group.value("select cdcbridge_internal.note_safe_point()")
    assert first_from(group, then) in (after, late)
    assert first_from(group, now(group)) == late + 1
    assert group.value("select count(*) from cdcbridge_internal.safe_points") == 3
    group.value("select cdcbridge_internal.note_safe_point()")
    assert group.value("select count(*) from cdcbridge_internal.safe_points") == 3, "nothing came"


@pytest.mark.parametrize("hours", [-30, -3, 3, 30])
def test_the_sources_clock_may_be_another_than_the_stores(group: StoreQueue, hours: int) -> None:
    put = group.append_keys("a", "b", "c", consumers=())
    group.session.execute(
        "update cdcbridge.messages set commit_time = now() + make_interval(hours => %s, secs => seq - %s)",
        (hours, put[2]),
    )
    moment = group.value("select commit_time::text from cdcbridge.messages where seq = %s", put[1])
    assert first_from(group, moment) == put[1]
    assert first_from(group, group.value("select (%s::timestamptz - interval '1 min')::text", moment)) == put[0]
    assert first_from(group, group.value("select (%s::timestamptz + interval '1 min')::text", moment)) == put[2] + 1
    until = "select cdcbridge_internal.seq_until(%s)"
    assert group.value(until, moment) == put[0]
    assert group.value(until, group.value("select (%s::timestamptz + interval '1 min')::text", moment)) == put[2]


def test_a_range_of_times_ends_with_what_may_have_been_committed_before(group: StoreQueue) -> None:
    slow = group.open(autocommit=False)
    late = publish(group, slow)
    other = publish(group)
    end = now(group)
    last = publish(group)
    slow.commit()
    assert group.value("select cdcbridge_internal.seq_until(%s)", end) == other
    assert group.value("select cdcbridge_internal.seq_until('latest')") == last
    assert group.value("select cdcbridge_internal.seq_until(%s)", str(last)) == other
    assert first_from(group, end) == late


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kolkata"])
@pytest.mark.parametrize("style", ["ISO, MDY", "German", "SQL, DMY"])
def test_a_time_names_its_zone_and_is_the_same_in_every_session(group: StoreQueue, zone: str, style: str) -> None:
    publish(group)
    group.session.execute("select set_config('timezone', %s, false), set_config('datestyle', %s, false)", (zone, style))
    for target in (
        "2020-05-01 10:00+02",
        "2020-05-01T08:00Z",
        "2020-05-01 08:00:00.123 UTC",
        "2020-05-01 10:00 Europe/Berlin",
    ):
        assert group.value("select cdcbridge.seek('s', %s)", target) == 16, target
    for target in ("2020-05-01", "2020-05-01 10:00", "2020-05-01T10:00:00.5", "today 10:00"):
        with pytest.raises(psycopg.Error, match="has no time zone") as raised:
            group.value("select cdcbridge.seek('s', %s)", target)
        assert raised.value.sqlstate == "CB004"
    for target in ("05.01.2026 10:00Z", "2020-13-01 10:00Z", "2020-05-01 10:00 Mars/Phobos", "sometime"):
        with pytest.raises(psycopg.Error, match="is not a place in the log") as raised:
            group.value("select cdcbridge.seek('s', %s)", target)
        assert raised.value.sqlstate == "CB004"
    assert group.value("show timezone") == zone
