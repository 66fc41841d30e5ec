"""The sentences for the engineer on call, and when a slot's growth is a forecast."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from cdcbridge.cli.lag_words import headline, say_wrapped
from cdcbridge.observe.alarms import SlotState, alarms, growth_now, latest_growth, wants_second_look
from cdcbridge.observe.lag import Lag, SlotLag, _moves
from cdcbridge.observe.xmin_holders import HorizonHolder
from cdcbridge.source.wal_room import OtherSlot, other_alarms
from cdcbridge.store.holders import ConsumerHolder, about, held_alarms, told

HOLDER = ConsumerHolder("ledger", "queue", "receiver", 4181, "stuck-worker", 120.0, "idle", None, 423, None, False)
SLOT = SlotLag("s", "pgoutput", True, "extended", "0/10", "0/20", "0/30", 97 << 20, 1 << 20, 1.0, 103 << 20, None, None,
               None, None, True)  # fmt: skip
LONG = HorizonHolder("source", "transaction", 7, "report", 1, 61.0, "active", None, True)


def test_a_receiver_is_named_with_the_statement_that_ends_it() -> None:
    begin = "ledger: 423 messages are held by the transaction of pid 4181 (stuck-worker), open for 2 min"
    assert told([HOLDER]) == [f"{begin}: `select pg_terminate_backend(4181)`"]
    assert told([replace(HOLDER, messages=1)])[0].startswith("ledger: 1 message is held by")
    assert told([replace(HOLDER, mode="fifo")])[0].startswith("ledger: at least 423 messages are held by")
    assert told([replace(HOLDER, messages=None)])[0].startswith("ledger: an unknown number of messages are held by")
    assert "max_in_flight is reached" in told([replace(HOLDER, limit_reached=True)])[0]
    assert "that only pg_read_all_stats shows" in told([replace(HOLDER, age_seconds=None)])[0]
    prepared = told([replace(HOLDER, pid=None, name="it's")])[0]
    assert "the prepared transaction it's" in prepared and "`rollback prepared 'it''s'`" in prepared


def test_members_and_publishers_are_named_with_those_that_wait() -> None:
    member = replace(HOLDER, kind="member", mode="stream", partitions=[3, 5], messages=17)
    assert told([member])[0].startswith(
        "ledger: partitions 3, 5 with 17 messages are held by the transaction of pid 4181"
    )
    publisher = replace(HOLDER, kind="publisher", messages=3)
    (line,) = told([publisher, replace(publisher, consumer="audit", messages=0)])
    assert line.startswith(
        "ledger (3 messages) and audit wait for the transaction of pid 4181 (stuck-worker), open for"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (12.3, "12 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (200000, "2 days")],
)
def test_a_time_has_one_unit(seconds: float, text: str) -> None:
    assert about(seconds) == text


def test_a_holder_is_an_alarm_after_a_minute_and_the_visibility_timeout() -> None:
    (alarm,) = held_alarms([HOLDER], {"ledger": 30.0})
    assert (alarm.code, alarm.consumer, alarm.message) == ("consumer_held", "ledger", told([HOLDER])[0])
    assert held_alarms([HOLDER], {"ledger": 600.0}) == [], "it may work for so long"
    assert held_alarms([replace(HOLDER, age_seconds=59.0)], {}) == []
    assert held_alarms([replace(HOLDER, age_seconds=None)], {}) == []


def _look(at: float, **changes: object) -> Lag:
    return Lag([replace(SLOT, **changes)], [], measured_at=at)  # type: ignore[arg-type]


def test_a_slot_that_moves_is_no_forecast() -> None:
    free = 103 << 20
    assert not _moves(SLOT, free, [], [], 0.0), "one look does not tell"
    assert not _moves(SLOT, free, [_look(0.0)], [], 10.0), "it stands still"
    assert _moves(SLOT, free, [_look(0.0, confirmed_flush_lsn="0/1")], [], 10.0)
    assert _moves(SLOT, free, [_look(0.0, restart_lsn="0/1")], [LONG], 10.0)
    held = [_look(0.0, confirmed_flush_lsn="0/1")]
    assert not _moves(SLOT, free, held, [LONG], 10.0), "an old transaction holds the WAL, whatever is confirmed"
    assert _moves(SLOT, free, [_look(0.0, restart_lsn="0/1")], [], 61.0), "more is free than it keeps"
    assert not _moves(SLOT, 90 << 20, [_look(0.0, restart_lsn="0/1")], [], 61.0), (
        "too slow for a minute, and little is left"
    )
    assert not _moves(replace(SLOT, active=False), free, [_look(0.0, restart_lsn="0/1")], [], 10.0)


def test_the_disk_is_forecast_where_there_is_no_limit() -> None:
    state = SlotState("s", False, "extended", None, 1 << 30, None, 60.0, float(1 << 20), 600 << 20)
    (alarm,) = alarms(state, max_retained=10 << 30, max_inactive=300.0)
    assert alarm.code == "disk_full_in_sight" and "fills the disk in 10m 0s" in alarm.message
    assert "start the bridge (`cdcbridge run`)" in alarm.message and "max_slot_wal_keep_size = '50GB'" in alarm.message
    assert alarms(replace(state, growth=None), max_retained=10 << 30, max_inactive=300.0) == []


def test_a_burst_that_is_over_is_no_forecast() -> None:
    burst = 80 << 20
    assert wants_second_look(8.0 * 2**20, 40 << 20) and wants_second_look(1.0, None), "also without a limit"
    assert not wants_second_look(1.0, 1 << 30), "too far away for an alarm"
    assert not wants_second_look(None, 1) and not wants_second_look(0.0, 1)
    still = growth_now([56], 0.5, burst, "07:31 UTC")
    assert (still.rate, still.quiet) == (0.0, "WAL: 80.0 MB written since 07:31 UTC, none in the last 0.5 s")
    grows = growth_now([1 << 20, 1 << 20], 1.0, burst, "07:31 UTC")
    assert (grows.rate, grows.quiet) == (2.0 * 2**20, "")
    once = growth_now([160 << 10, 0], 1.0, burst, "07:31 UTC")
    assert (once.rate, once.quiet) == (0.0, "WAL: 80.0 MB written since 07:31 UTC, 160.0 kB in the last 1.0 s")
    state = SlotState("s", False, "extended", None, burst, 40 << 20, 9.0, grows.rate, None, grows.basis, 128 << 20)
    limits = {"max_retained": 10 << 30, "max_inactive": 300.0}
    (alarm,) = alarms(state, **limits)  # type: ignore[arg-type]
    assert alarm.message.startswith(
        "at this rate (2.0 MB/s in the last 1.0 s) max_slot_wal_keep_size is reached in 20.0 s"
    )
    quiet = replace(state, growth=still.rate, basis=still.basis)
    assert alarms(quiet, **limits) == []  # type: ignore[arg-type]
    (near,) = alarms(replace(quiet, safe_wal_bytes=12 << 20), **limits)  # type: ignore[arg-type]
    assert near.code == "slot_limit_near" and near.message.startswith("the slot s is lost after 12.0 MB more of WAL")
    assert alarms(replace(quiet, safe_wal_bytes=12 << 20, active=True), **limits) == []  # type: ignore[arg-type]


def test_looks_of_a_watch_tell_growth_by_the_latest_ones() -> None:
    looks = [(0.0, 0), (4.0, 80 << 20), (8.0, 80 << 20), (12.0, 80 << 20)]
    assert latest_growth(looks[:2]).rate is None, "a checkpoint may be all that was written"
    assert latest_growth(looks[:3]).rate == 0.0, "a burst in one interval"
    steady = latest_growth([(0.0, 0), (4.0, 80 << 20), (8.0, 120 << 20)])
    assert (steady.rate, steady.basis) == (10.0 * 2**20, "in the last 8.0 s")
    assert latest_growth(looks).rate == 0.0, "the burst is over"


def test_a_slot_of_others_is_an_alarm_when_it_keeps_too_much() -> None:
    other = OtherSlot("debezium", "logical", "pgoutput", "app", False, "extended", 11 << 30)
    (alarm,) = other_alarms([other, replace(other, name="small", retained_bytes=1)], 10 << 30)
    assert alarm.slot == "debezium" and "`select pg_drop_replication_slot('debezium')`" in alarm.message


def test_the_headline_says_since_when_no_bridge_runs() -> None:
    def line(**changes: object) -> str:
        return headline(_look(0.0, **changes))

    assert line() == ""
    away = "no bridge has been running for 12 s: start it with `cdcbridge run`"
    assert line(active=False, inactive_seconds=12.3) == away
    assert "for 12 s at most:" in line(active=False, inactive_seconds=12.3, failover=None)
    assert line(active=False) == "no bridge is running: start it with `cdcbridge run`"
    assert line(active=False, wal_status="lost") == ""


def test_no_line_is_broken_within_a_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    text = told([HOLDER])[0]
    say_wrapped(text)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2 and all(len(line) <= 40 for line in lines)
    assert " ".join(" ".join(lines).split()) == text
