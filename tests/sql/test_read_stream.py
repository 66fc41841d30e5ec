"""read_stream, commit_offset, seek: what each promises, and what each refuses."""

from __future__ import annotations

import psycopg
import pytest

from tests.sql.queue import Row, StoreQueue


@pytest.fixture(autouse=True)
def _stream(queue: StoreQueue) -> None:
    queue.declare("s", mode="stream", topics=("news",), start="earliest")


def publish(queue: StoreQueue, *keys: str | None, session: psycopg.Connection[Row] | None = None) -> list[int]:
    return [queue.value("select cdcbridge.publish('news', %s, '1')", key, session=session) for key in keys]


def read(
    queue: StoreQueue, count: int = 100, lease: str | None = None, *, session: psycopg.Connection[Row] | None = None
) -> list[Row]:
    return queue.all("select * from cdcbridge.read_stream('s', %s, %s::interval)", count, lease, session=session)


def commit(
    queue: StoreQueue,
    partition: int,
    seq: int,
    receipt: str | None = None,
    *,
    session: psycopg.Connection[Row] | None = None,
) -> bool:
    query = "select cdcbridge.commit_offset('s', %s, %s, %s)"
    return bool(queue.value(query, partition, seq, receipt, session=session))


def finish(queue: StoreQueue, rows: list[Row]) -> None:
    assert commit(queue, rows[-1]["partition"], rows[-1]["seq"], rows[-1]["receipt"])


def drain(queue: StoreQueue, count: int = 100) -> list[int]:
    got = []
    while rows := read(queue, count, "1 min"):
        assert len({row["partition"] for row in rows}) == 1
        got += [row["seq"] for row in rows]
        finish(queue, rows)
    return got


def test_a_group_reads_everything_once_in_order_within_each_partition(queue: StoreQueue) -> None:
    put = publish(queue, *[f"k{n}" for n in range(50)], None) + queue.append_keys(*"abcabc", consumers=())
    rows: list[Row] = []
    while batch := read(queue, 4, "1 min"):
        rows += batch
        finish(queue, batch)
    assert sorted(row["seq"] for row in rows) == put
    for partition in {row["partition"] for row in rows}:
        mine = [row["seq"] for row in rows if row["partition"] == partition]
        assert mine == sorted(mine)
    assert read(queue) == []


def test_within_a_transaction_reading_and_offset_are_one(queue: StoreQueue) -> None:
    put = publish(queue, "a", "a")
    member = queue.open(autocommit=False)
    rows = read(queue, session=member)
    assert [row["seq"] for row in rows] == put
    assert rows[0]["receipt"] is None
    assert read(queue) == [], "the partition is the other's"
    commit(queue, rows[0]["partition"], put[0], session=member)
    member.rollback()
    assert [row["seq"] for row in read(queue, session=member)] == put, "as if nothing had been read"
    commit(queue, rows[0]["partition"], put[0], session=member)
    assert [row["seq"] for row in read(queue, session=member)] == put[1:], "free again for the same transaction"
    member.commit()
    assert [row["seq"] for row in read(queue)] == put[1:]


def test_a_second_read_in_a_transaction_takes_another_partition(queue: StoreQueue) -> None:
    publish(queue, "a", "b", "c", "d", "e")
    partitions = {row["partition"] for row in queue.all("select partition from cdcbridge.messages")}
    member = queue.open(autocommit=False)
    seen = []
    while rows := read(queue, session=member):
        seen.append(rows[0]["partition"])
    assert sorted(seen) == sorted(partitions)
    assert read(queue) == []
    member.rollback()
    assert read(queue) != []


def test_a_read_that_returns_nothing_holds_nothing(queue: StoreQueue) -> None:
    member = queue.open(autocommit=False)
    assert read(queue, session=member) == []
    put = publish(queue, "a")
    assert [row["seq"] for row in read(queue)] == put


def test_the_least_recently_read_partition_comes_first(queue: StoreQueue) -> None:
    publish(queue, *[f"k{n}" for n in range(100)], *[f"k{n}" for n in range(100)])
    order = []
    for _ in range(48):
        rows = read(queue, 2, "1 min")
        order.append(rows[0]["partition"])
        finish(queue, rows)
    assert len(set(order[:16])) == 16
    assert order[:16] == order[16:32] == order[32:]


def test_under_a_lease_nobody_else_reads_the_partition_until_it_ends(queue: StoreQueue) -> None:
    put = publish(queue, "a", "a")
    first = read(queue, 1, "1 hour")
    assert read(queue, 1, "1 hour") == []
    expire(queue)
    second = read(queue, 1, "1 hour")
    assert [row["seq"] for row in second] == put[:1]
    with pytest.raises(psycopg.Error, match="stale receipt") as refused:
        finish(queue, first)
    assert refused.value.sqlstate == "CB006"
    finish(queue, second)
    with pytest.raises(psycopg.Error, match="stale receipt"):
        finish(queue, second)
    assert drain(queue) == put[1:]


def expire(queue: StoreQueue) -> None:
    queue.session.execute(
        "update cdcbridge_internal.offsets set leased_until = now() - interval '1 s' where leased_until is not null"
    )


def test_an_expired_lease_cannot_move_the_offset_though_nobody_took_the_partition(queue: StoreQueue) -> None:
    put = publish(queue, "a")
    rows = read(queue, 1, "1 hour")
    expire(queue)
    with pytest.raises(psycopg.Error, match="stale receipt"):
        finish(queue, rows)
    assert drain(queue) == put


def test_a_lease_can_be_extended_while_it_lasts(queue: StoreQueue) -> None:
    publish(queue, "a")
    rows = read(queue, 1, "10 s")
    arguments = (rows[0]["partition"], rows[0]["receipt"])
    extend = "select cdcbridge.extend_lease('s', %s, %s, '1 hour')"
    queue.value(extend, *arguments)
    left = queue.value("select max(leased_until) - now() > interval '50 min' from cdcbridge.consumer_group_offsets")
    assert left is True
    expire(queue)
    with pytest.raises(psycopg.Error, match="stale receipt"):
        queue.value(extend, *arguments)
    with pytest.raises(psycopg.Error, match="lease is null, but must be more than 0 s"):
        queue.value("select cdcbridge.extend_lease('s', %s, %s, null)", *arguments)


def test_no_reader_passes_a_seq_that_can_still_commit(queue: StoreQueue) -> None:
    hung = queue.open(autocommit=False)
    (first,) = publish(queue, "a", session=hung)
    later = publish(queue, "a", "b", "c")
    assert drain(queue) == []
    holders = queue.all("select pid, seq, age_seconds from cdcbridge_internal.safe_seq_holders()")
    assert [(h["pid"], h["seq"]) for h in holders] == [(hung.info.backend_pid, first)]
    assert holders[0]["age_seconds"] > 0
    hung.commit()
    assert sorted(drain(queue)) == [first, *later]


def test_a_group_of_tables_alone_is_not_held_back_by_publishers(queue: StoreQueue) -> None:
    queue.declare("t", mode="stream", start="earliest")
    hung = queue.open(autocommit=False)
    publish(queue, "a", session=hung)
    put = queue.append_keys("a", "b", consumers=())
    rows = queue.all("select * from cdcbridge.read_stream('t')")
    assert [row["seq"] for row in rows] == put
    hung.rollback()


def test_what_a_group_does_not_want_moves_its_offset_on(queue: StoreQueue) -> None:
    queue.declare("u", mode="stream", tables=("public.t",), operations=("delete",), start="earliest")
    queue.append_keys("a", "b", consumers=())
    hung = queue.open(autocommit=False)
    held = publish(queue, "x", session=hung)
    last = publish(queue, "x")
    where = "select max(seq) from cdcbridge.consumer_group_offsets where consumer_name = 'u'"
    assert queue.all("select * from cdcbridge.read_stream('u')") == []
    assert queue.value(where) < held[0], "not over what can still commit"
    hung.rollback()
    assert queue.all("select * from cdcbridge.read_stream('u')") == []
    assert queue.value(where) == last[0]


def test_operations_and_patterns_choose_what_a_group_reads(queue: StoreQueue) -> None:
    queue.declare("all", mode="stream", tables=("*.*",), start="earliest")
    queue.declare("schema", mode="stream", tables=("public.*",), operations=("insert", "delete"), start="earliest")
    queue.declare("other", mode="stream", tables=("public.other", "private.*"), start="earliest")
    put = queue.append_keys("a", "!", consumers=())
    publish(queue, "a")
    found = {name: queue.all("select seq from cdcbridge.read_stream(%s)", name) for name in ("all", "schema", "other")}
    assert {name: [row["seq"] for row in rows] for name, rows in found.items()} == {
        "all": put, "schema": put[:1], "other": []}  # fmt: skip


def test_seek_goes_anywhere_in_the_log(queue: StoreQueue) -> None:
    put = publish(queue, "a", "a", "a")
    queue.session.execute(
        "update cdcbridge.messages set inserted_at = '2030-01-01'::timestamptz + (seq - %s) * interval '1 day'",
        (put[0],),
    )
    partition = queue.value("select distinct partition from cdcbridge.messages")
    assert drain(queue) == put
    for target, expected in (("earliest", put), (str(put[1]), put[1:]), ("latest", []), ("2030-01-02 00:00+00", put[1:]),
                             ("2031-01-01Z", []), ("2029-01-01 00:00Z", put), (str(put[2] + 1), [])):  # fmt: skip
        assert queue.value("select cdcbridge.seek('s', %s)", target) == 16
        assert drain(queue) == expected, target
    assert queue.value("select cdcbridge.seek('s', 'earliest', %s)", (partition + 1) % 16) == 1
    assert drain(queue) == []
    assert queue.value("select cdcbridge.seek('s', 'earliest', %s)", partition) == 1
    assert drain(queue) == put


def test_seek_ends_leases(queue: StoreQueue) -> None:
    put = publish(queue, "a", "a")
    rows = read(queue, 1, "1 hour")
    queue.value("select cdcbridge.seek('s', 'earliest')")
    with pytest.raises(psycopg.Error, match="stale receipt"):
        finish(queue, rows)
    assert drain(queue) == put


def test_a_new_group_begins_now_or_at_what_the_log_holds(queue: StoreQueue) -> None:
    publish(queue, "a")
    queue.declare("late", mode="stream", topics=("news",))
    queue.declare("early", mode="stream", topics=("news",), start="earliest")
    hung = queue.open(autocommit=False)
    put = publish(queue, "a", session=hung)
    queue.declare("later", mode="stream", topics=("news",))
    hung.commit()
    for name, expected in (("late", 1), ("early", 2), ("later", 1)):
        rows = queue.all("select seq from cdcbridge.read_stream(%s)", name)
        assert (len(rows), rows[-1]["seq"]) == (expected, put[0]), name


def test_lag_counts_what_a_group_has_yet_to_read(queue: StoreQueue) -> None:
    put = publish(queue, "a", "a", "a", "b")
    publish(queue, None)
    lag = queue.all("select * from cdcbridge.consumer_lag() where name = 's'")[0]
    assert (lag["mode"], lag["pending"], lag["in_flight"], lag["dead"]) == ("stream", 5, 0, 0)
    assert lag["oldest_age_seconds"] > 0
    rows = read(queue, 2, "1 min")
    finish(queue, rows)
    of = {row["partition"]: row for row in queue.all("select * from cdcbridge.group_lag('s')")}
    assert len(of) == 16
    assert sum(row["messages"] for row in of.values()) == 5 - len(rows)
    drain(queue)
    assert queue.all("select * from cdcbridge.consumer_lag() where name = 's'")[0]["oldest_age_seconds"] is None
    assert put


def test_a_paused_group_reads_nothing_and_is_told(queue: StoreQueue) -> None:
    publish(queue, "a")
    queue.session.execute("update cdcbridge.consumers set paused = true")
    notices: list[str] = []
    queue.session.add_notice_handler(lambda notice: notices.append(str(notice.message_primary)))
    assert read(queue) == []
    assert notices == ["consumer 's' is paused"]


def test_partitions_of_two_stores_have_locks_of_their_own(queue: StoreQueue) -> None:
    queue.session.execute("set search_path = cdcbridge, cdcbridge_internal")
    query = """select count(distinct l), min(l >> 32)
               from (select partition_lock(c, p) as l from generate_series(1, 3) c, generate_series(0, 15) p) x"""
    assert queue.all(query) == [{"count": 48, "min": queue.value("select 'offsets'::regclass::oid::bigint")}]


def test_a_read_that_goes_on_in_its_transaction_holds_no_partition_that_it_passed_over(queue: StoreQueue) -> None:
    queue.declare("few", mode="stream", tables=("public.few",), start="earliest")
    queue.append_keys("a", consumers=())
    member = queue.open(autocommit=False)
    assert queue.all("select * from cdcbridge.read_stream('few')", session=member) == []
    assert queue.all("select * from cdcbridge.read_stream('few')", session=member) == []
    locks = "select count(*) from pg_locks where pid = %s and locktype = 'advisory'"
    assert queue.value(locks, member.info.backend_pid) == 0


def test_a_time_never_leads_past_what_can_still_commit(queue: StoreQueue) -> None:
    hung = queue.open(autocommit=False)
    held = publish(queue, "a", session=hung)
    moment = queue.value("select clock_timestamp()::text")
    put = publish(queue, "a")
    queue.value("select cdcbridge.seek('s', %s)", moment)
    hung.commit()
    assert drain(queue) == [*held, *put]


def test_a_group_of_tables_seeks_where_it_has_read_while_a_publisher_hangs(queue: StoreQueue) -> None:
    queue.declare("t", mode="stream", start="earliest")
    hung = queue.open(autocommit=False)
    publish(queue, "a", session=hung)
    put = queue.append_keys("a", "b", consumers=())
    read_all = "select seq from cdcbridge.read_stream('t')"
    queue.value("select cdcbridge.commit_offset('t', 0, %s)", put[-1])
    queue.value("select cdcbridge.seek('t', %s)", str(put[1]))
    assert [row["seq"] for row in queue.all(read_all)] == put[1:]
    queue.value("select cdcbridge.commit_offset('t', 0, %s)", put[-1])
    queue.value("select cdcbridge.seek('t', 'latest')")
    assert queue.all(read_all) == [], "not back to what the publisher holds"
    hung.rollback()


def test_a_removed_group_leaves_nothing(queue: StoreQueue) -> None:
    publish(queue, "a")
    queue.value("select cdcbridge_internal.remove_consumer('s')")
    assert queue.value("select count(*) from cdcbridge_internal.offsets") == 0
    publish(queue, "a")


REFUSED = [
    ("read_stream('nobody')", "CB001", "no consumer named 'nobody'"),
    ("read_stream('q')", "CB002", "is a queue, not a stream"),
    ("receive('s')", "CB002", "reads the log as a stream"),
    ("read_stream('s', 0)", "CB004", "max_messages is 0"),
    ("read_stream('s', 1, '0')", "CB004", "lease is 00:00:00"),
    ("commit_offset('nobody', 0, 0)", "CB001", "no consumer named"),
    ("commit_offset('s', 99, 0)", "CB004", "there is no partition 99"),
    ("commit_offset('s', null, 0)", "CB004", "there is no partition null"),
    ("commit_offset('s', 0, null)", "CB004", "seq null is below"),
    ("commit_offset('s', 0, -1)", "CB004", "seq -1 is below the offset 0"),
    ("commit_offset('s', 0, 1000)", "CB004", "after the end of the log"),
    ("commit_offset('s', 0, 0, 'x')", "CB003", "'x' is not a receipt of partition 0"),
    ("commit_offset('s', 0, 0, '1-1')", "CB003", "'1-1' is not a receipt of partition 0"),
    ("commit_offset('s', 0, 0, '0-999')", "CB006", "stale receipt"),
    ("seek('s', 'sometime')", "CB004", "'sometime' is not a place in the log"),
    ("seek('s', null)", "CB004", "the target is null"),
    ("seek('s', '1000')", "CB004", "after the end of the log"),
    ("seek('s', 'earliest', 99)", "CB004", "there is no partition 99"),
    ("group_lag('q')", "CB002", "not a stream"),
]


@pytest.mark.parametrize(("call", "state", "message"), REFUSED, ids=[call for call, *_ in REFUSED])
def test_what_is_refused_and_how(queue: StoreQueue, call: str, state: str, message: str) -> None:
    queue.declare("q")
    with pytest.raises(psycopg.Error) as refused:
        queue.all(f"select * from cdcbridge.{call}")
    assert refused.value.sqlstate == state
    assert message in str(refused.value)


@pytest.mark.parametrize("call", ["read_stream('s')", "commit_offset('s', 0, 0)"])
def test_above_read_committed_nothing_is_read(queue: StoreQueue, call: str) -> None:
    session = queue.open(autocommit=False)
    session.execute("set transaction isolation level repeatable read")
    with pytest.raises(psycopg.Error, match="REPEATABLE READ") as refused:
        queue.all(f"select * from cdcbridge.{call}", session=session)
    assert refused.value.sqlstate == "CB005"


def test_commit_below_the_offset_names_seek(queue: StoreQueue) -> None:
    rows_of = publish(queue, "a", "a")
    rows = read(queue)
    assert commit(queue, rows[0]["partition"], rows_of[1]) is True
    assert commit(queue, rows[0]["partition"], rows_of[1]) is False
    with pytest.raises(psycopg.Error) as refused:
        commit(queue, rows[0]["partition"], rows_of[0])
    assert refused.value.diag.message_hint is not None and "seek" in refused.value.diag.message_hint


def test_under_a_lease_a_receipt_is_needed(queue: StoreQueue) -> None:
    publish(queue, "a")
    rows = read(queue, 1, "1 hour")
    with pytest.raises(psycopg.Error, match="none was given, but the partition has a lease"):
        commit(queue, rows[0]["partition"], rows[0]["seq"])


def test_a_groups_role_alone_may_read_it(queue: StoreQueue) -> None:
    queue.session.execute("drop role if exists stream_reader")
    queue.session.execute("create role stream_reader")
    queue.declare("mine", mode="stream", topics=("news",), start="earliest", role="stream_reader")
    publish(queue, "a")
    queue.session.execute("set role stream_reader")
    (row,) = queue.all("select * from cdcbridge.read_stream('mine', 1, '1 min')")
    assert queue.value(
        "select cdcbridge.commit_offset('mine', %s, %s, %s)", row["partition"], row["seq"], row["receipt"]
    )
    queue.session.execute("reset role")
    queue.session.execute("drop role if exists stranger")
    queue.session.execute("create role stranger")
    queue.session.execute("grant usage on schema cdcbridge to stranger")
    queue.session.execute("set role stranger")
    for call in ("read_stream('mine')", "commit_offset('mine', 0, 0)", "seek('mine', 'latest')", "group_lag('mine')"):
        with pytest.raises(psycopg.Error) as refused:
            queue.all(f"select * from cdcbridge.{call}")
        assert refused.value.sqlstate == "CB008", call
    queue.session.execute("reset role")
    queue.value("select cdcbridge_internal.remove_consumer('mine')")
    for role in ("stranger", "stream_reader"):
        queue.session.execute(f"drop owned by {role}")
        queue.session.execute(f"drop role {role}")
