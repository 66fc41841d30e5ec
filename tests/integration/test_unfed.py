"""A consumer that got nothing for a while is told so by a gap message, before its next change. Nobody else is told."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any

import pytest

from cdcbridge.instants import Instant
from tests.harness.world import World, eventually
from tests.integration.test_apply import keys, other_file, process, reconnect

GAPS = (
    "select m.seq, m.data -> 'record' ->> 'from', m.data -> 'record' ->> 'to', m.data -> 'record' ->> 'reason'"
    " from consumer_messages w join consumers c on c.id = w.consumer_id join messages m using (seq)"
    " where c.name = %s and m.data ->> 'op' = 'gap' order by seq"
)


@pytest.fixture
def shop(world: World) -> World:
    """Two tables, and a consumer of the first that is always fed."""
    world.execute("create table t (id int primary key, v int)", "create table u (id int primary key, v int)")
    world.consumer("good")
    return world


def gaps(world: World, name: str) -> list[tuple[Any, ...]]:
    return world.rows(GAPS, name)


def since(world: World, name: str) -> str | None:
    """From where on the consumer gets nothing, as the store notes it."""
    query = "select feeds -> 'unfed' ->> (select id::text from consumers where name = %s) from source"
    return world.value(query, name)  # type: ignore[no-any-return]


def state(world: World, name: str) -> str | None:
    return world.value("select feeds -> 'consumers' -> %s ->> 'state' from source", name)  # type: ignore[no-any-return]


def drop(world: World, name: str) -> dict[str, Any]:
    """Take the consumer out of the bridge's file and let the bridge read it; the entry."""
    (entry,) = (c for c in world.consumers if c["name"] == name)
    world.consumers = [c for c in world.consumers if c["name"] != name]
    world.write_config()
    reconnect(world)
    eventually(lambda: state(world, name) == "not_in_file" and world.active(), "it gets nothing")
    return entry


def missed(world: World, key: int) -> None:
    """A change that the log has, and that nobody but `good` gets; the log's end is behind it."""
    world.execute(f"insert into u values ({key})", f"insert into t values ({key})")
    eventually(lambda: str(key) in keys(world, "good"), "the log has gone on")


def apply(world: World) -> None:
    applied = world.run_program("consumers", "apply")
    assert applied.returncode == 0 and "gets nothing" not in applied.stderr, applied


def test_a_consumer_that_is_fed_again_is_told_from_where_to_where(shop: World) -> None:
    shop.consumer("late", ("public.u",))
    with process(shop):
        shop.execute("insert into u values (1)")
        eventually(lambda: keys(shop, "late") == ["1"])
        entry = drop(shop, "late")
        stopped = since(shop, "late")
        missed(shop, 2)
        reconnect(shop)  # sessions that do not feed it either leave the beginning as it is
        missed(shop, 3)
        assert since(shop, "late") == stopped
        change = "select commit_lsn from messages where topic = 'public.t' order by seq limit 1"
        shop.consumers.append(entry)
        apply(shop)
        shop.execute("insert into u values (4)")
        eventually(lambda: keys(shop, "late") == ["1", "4"])
        ((seq, first, last, reason),) = gaps(shop, "late")
        assert first == stopped and since(shop, "late") is None
        inside = shop.value(f"select %s::pg_lsn < ({change}) and ({change}) < %s::pg_lsn", first, last)
        assert inside, "the changes are between the two"
        assert f"did not feed the consumer: its file {shop.folder / 'cdcbridge.yaml'} lacked it" in reason
        seqs = "select seq from messages where topic = 'public.u' order by seq"
        assert [s > seq for (s,) in shop.rows(seqs)] == [False, True], "before its first change"
        assert gaps(shop, "good") == [], "nobody else is told"
        (note,) = shop.json("status", "--json")["notes"]
        assert f"changes from {first} to {last} may be missing for late (the bridge (" in note
        assert "`cdcbridge backfill start late TABLE`" in note
        reconnect(shop)
        missed(shop, 5)
        assert len(gaps(shop, "late")) == 1, "it is told once"


@pytest.mark.parametrize("instant", ["committed", "about to note feeds"])
def test_a_kill_between_the_gap_and_the_note_neither_loses_nor_repeats_it(shop: World, instant: Instant) -> None:
    shop.consumer("late", ("public.u",))
    with process(shop):
        entry = drop(shop, "late")
        stopped = since(shop, "late")
        missed(shop, 1)
    shop.consumers.append(entry)
    killed = shop.start_process(crash=(instant, 1))
    assert killed.wait(30) == -signal.SIGKILL
    assert since(shop, "late") is None and len(gaps(shop, "late")) == 1, "the gap is told, and noted as told"
    with process(shop):
        shop.execute("insert into u values (2)")
        eventually(lambda: keys(shop, "late") == ["2"])
        (told,) = gaps(shop, "late")
        assert told[1] == stopped and since(shop, "late") is None


def test_a_kill_before_the_gap_leaves_it_to_the_next_session(shop: World) -> None:
    shop.consumer("late", ("public.u",))
    with process(shop):
        entry = drop(shop, "late")
        missed(shop, 1)
    shop.consumers.append(entry)
    killed = shop.start_process(crash=("position written", 1))
    assert killed.wait(30) == -signal.SIGKILL
    assert gaps(shop, "late") == []
    with process(shop):
        eventually(lambda: len(gaps(shop, "late")) == 1)


def test_a_consumer_that_is_taken_up_normally_gets_no_gap(shop: World) -> None:
    with process(shop):
        missed(shop, 1)
        for name, settings in {
            "now": {},
            "all": {"start": "earliest"},
            "whole": {"start": "snapshot"},
            "reader": {"mode": "stream"},
        }.items():
            shop.consumer(name, ("public.u",), **settings)
            apply(shop)
            missed(shop, len(shop.consumers) + 10)
    missed_none = shop.value("select count(*) from messages where topic = 'cdcbridge.gap'")
    shop.consumer("stopped", ("public.u",))
    apply(shop)  # no bridge runs
    with process(shop):
        missed(shop, 20)
        eventually(lambda: "20" in keys(shop, "stopped"))
    assert (missed_none, shop.value("select count(*) from messages where topic = 'cdcbridge.gap'")) == (0, 0)


@pytest.mark.parametrize("start", ["now", "earliest", "snapshot"])
def test_one_that_another_file_applied(shop: World, tmp_path_factory: pytest.TempPathFactory, start: str) -> None:
    """It began with its application, except for a snapshot, which a bridge begins when its file has the consumer."""
    other = other_file(shop, tmp_path_factory.mktemp("other"))
    other.consumer("late", ("public.u",), start=start)
    with process(shop):
        missed(shop, 1)
        assert "late gets nothing" in other.run_program("consumers", "apply").stderr
        missed(shop, 2)
        missed(shop, 3)
        shop.consumers = other.consumers
        apply(shop)
        shop.execute("insert into u values (4)")
        eventually(lambda: "4" in keys(shop, "late"))
        if start == "snapshot":
            eventually(lambda: sorted(keys(shop, "late")) == ["1", "2", "3", "4"])
            assert gaps(shop, "late") == []
        else:
            ((_, first, last, _),) = gaps(shop, "late")
            query = "select commit_lsn > %s::pg_lsn, commit_lsn < %s::pg_lsn from messages where topic = 'public.t'"
            assert shop.rows(query + " order by seq", first, last) == [(False, True), (True, True), (True, True)]
        assert gaps(shop, "good") == []


def test_a_snapshot_that_had_begun_does_not_make_up(shop: World) -> None:
    shop.execute("insert into u values (1)")
    shop.consumer("late", ("public.u",), start="snapshot")
    with process(shop):
        eventually(lambda: keys(shop, "late") == ["1"])
        entry = drop(shop, "late")
        missed(shop, 2)
        shop.consumers.append(entry)
        apply(shop)
        assert len(gaps(shop, "late")) == 1


def test_a_stream_alone_reads_its_gap(shop: World) -> None:
    for name in ("late", "other"):
        shop.consumer(name, ("public.u",), mode="stream")
    shop.consumer("ordered", ("public.u",), mode="fifo")
    with process(shop):
        entries = [drop(shop, name) for name in ("late", "ordered")]
        missed(shop, 1)
        shop.consumers += entries
        apply(shop)
        shop.execute("insert into u values (2)")
        eventually(lambda: keys(shop, "ordered") == ["2"])
        read = "select count(*) from read_stream(%s, 100, '1 min') where data ->> 'op' = 'gap'"

        def told(name: str) -> int:
            return sum(shop.value(read, name) for _ in range(16))

        assert (told("late"), told("other"), len(gaps(shop, "ordered"))) == (1, 0, 1)


def test_what_an_earliest_consumer_finds_in_the_log(shop: World) -> None:
    """A gap of one consumer is nothing to another that begins with the whole log, or replays it."""
    shop.consumer("late", ("public.u",))
    with process(shop):
        entry = drop(shop, "late")
        missed(shop, 1)
        shop.consumers.append(entry)
        apply(shop)
        assert len(gaps(shop, "late")) == 1
        shop.consumer("all", ("public.t",), start="earliest")
        apply(shop)
        eventually(lambda: keys(shop, "all") == ["1"])
        assert gaps(shop, "all") == []


def test_a_consumer_that_was_made_anew_missed_nothing(shop: World) -> None:
    shop.consumer("late", ("public.u",))
    with process(shop):
        entry = drop(shop, "late")
        missed(shop, 1)
    assert shop.run_program("consumers", "remove", "late", "--yes").returncode == 0
    shop.consumers.append(entry)
    apply(shop)
    with process(shop):
        shop.execute("insert into u values (2)")
        eventually(lambda: keys(shop, "late") == ["2"])
        assert gaps(shop, "late") == []


def test_a_stand_by_with_another_file_and_back(shop: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = other_file(shop, tmp_path_factory.mktemp("other"))
    shop.consumer("late", ("public.u",))
    with process(shop):
        missed(shop, 1)
    with contextlib.closing(other), process(other):
        missed(other, 2)
        assert state(shop, "late") == "not_in_file"
    with process(shop):
        missed(shop, 3)
        ((_, _, _, reason),) = gaps(shop, "late")
        assert str(Path(other.folder) / "cdcbridge.yaml") in reason
        assert keys(shop, "late") == ["1", "3"]


def test_one_that_goes_on_as_before_or_faulty_gets_no_gap(shop: World) -> None:
    shop.execute("create table gone (id int primary key)")
    shop.consumer("late", ("public.u",))
    shop.consumer("part", ("public.u", "public.gone"))
    with process(shop):
        missed(shop, 1)
        shop.consumer("late", ("public.u", "public.absent"))
        shop.execute("drop table gone")
        shop.write_config()
        reconnect(shop)
        eventually(lambda: (state(shop, "late"), state(shop, "part")) == ("as_before", "fed"))
        eventually(lambda: shop.value("select feeds -> 'consumers' -> 'part' ->> 'reason' <> '' from source"))
        eventually(shop.active)
        missed(shop, 2)
        shop.execute("create table absent (id int primary key)", "create table gone (id int primary key)")
        eventually(lambda: (state(shop, "late"), keys(shop, "late")) == ("fed", ["1", "2"]))
        missed(shop, 3)
        reasons = [reason for name in ("late", "part") for *_, reason in gaps(shop, name)]
        assert not any("did not feed" in reason for reason in reasons)


def test_notes_of_a_version_that_did_not_keep_where(shop: World) -> None:
    shop.consumer("late", ("public.u",))
    with process(shop):
        entry = drop(shop, "late")
        missed(shop, 1)
    shop.rows("update source set feeds = feeds - 'unfed' returning 1")
    with process(shop):
        missed(shop, 2)
        assert since(shop, "late") == "0/0"
        shop.consumers.append(entry)
        apply(shop)
        ((_, first, _, reason),) = gaps(shop, "late")
        assert first == "0/0" and "An older version did not note" in reason
