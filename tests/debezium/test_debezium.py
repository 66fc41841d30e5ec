"""The events of `format: debezium` beside those that a Debezium engine made of the same changes.

Debezium's events are in events.jsonl. docs/SINKS.md lists the differences, and these tests find no others.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any, Final

import pytest

from tests.debezium.record import FOLDER, halves, run
from tests.harness.world import World, eventually

PAGE: Final = FOLDER.parents[1] / "docs" / "SINKS.md"
Event = dict[str, Any]
# What differs from run to run, or names the program and the database.
OWN: Final = {"version", "name", "db", "ts_ms", "ts_us", "ts_ns", "txId", "lsn", "sequence"}


def theirs() -> list[Event]:
    """Debezium's events without the tombstones, and without the message that is written for cdcbridge."""
    pairs = [json.loads(line) for line in (FOLDER / "events.jsonl").read_text().splitlines()]
    ours = {"prefix": "cdcbridge:invoices"}
    return [value for key, value in pairs if value is not None and key != ours]


@pytest.fixture
def ours(world: World) -> list[Event]:
    """The same changes in a file."""
    before, after = halves()
    run(world.sql, before)
    out = world.folder / "events.jsonl"
    sink = {"type": "file", "path": str(out), "format": "debezium"}
    world.consumer("events", ("public.*",), topics=["invoices"], sink=sink)
    with world.bridge():
        run(world.sql, after)
        world.start_sinks()
        eventually(lambda: out.exists() and b'"invoices"' in out.read_bytes(), "all are in the file")
    return [json.loads(line)["data"] for line in out.read_bytes().splitlines()]


@pytest.fixture
def pairs(ours: list[Event]) -> list[tuple[Event, Event]]:
    """Our event and Debezium's of each change. Debezium has none of the truncate, and two of the changed key."""
    changes = [event for event in ours if event["op"] != "t"]
    assert len(changes) == len(ours) - 1
    found = theirs()
    key_change = next(n for n, (one, next_one) in enumerate(pairwise(found)) if moves_a_key(one, next_one))
    deleted, created = found[key_change : key_change + 2]
    found[key_change : key_change + 2] = [{**created, "op": "u", "before": deleted["before"]}]
    return list(zip(changes, found, strict=True))


def moves_a_key(one: Event, next_one: Event) -> bool:
    """Whether two events of Debezium are the delete and the create of one update."""
    return (one["op"], next_one["op"]) == ("d", "c") and one["source"]["lsn"] == next_one["source"]["lsn"]


def test_each_event_has_debeziums_fields(pairs: list[tuple[Event, Event]]) -> None:
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys() and ours["source"].keys() == theirs["source"].keys()
        assert (ours["op"], ours["transaction"]) == (theirs["op"], None)
        assert type(ours["ts_ms"]) is type(theirs["ts_ms"]) is int
        for name, value in theirs["source"].items():
            mine = ours["source"][name]
            assert name in OWN or mine == value, (name, mine, value)
            assert type(mine) is type(value) or (ours["op"] == "m" and name in ("txId", "lsn")), (name, mine, value)
        assert len(json.loads(ours["source"]["sequence"])) == len(json.loads(theirs["source"]["sequence"])) == 2
        assert ours.get("message") == theirs.get("message")


def test_the_rows_are_debeziums(pairs: list[tuple[Event, Event]]) -> None:
    compared = 0
    for ours, theirs in pairs:
        for side in ("before", "after"):
            mine, other = ours.get(side), theirs.get(side)
            if mine is None or other is None:
                assert mine is other
            elif ours["source"]["table"] != "types":
                absent = other.keys() - mine.keys()  # the WAL has the old key alone
                assert mine == {name: other[name] for name in mine} and all(other[name] is None for name in absent)
                assert not absent or side == "before"
                compared += 1
    assert compared == 17


def test_the_values_that_differ_are_on_the_page(world: World, pairs: list[tuple[Event, Event]]) -> None:
    (full, empty) = [pair for pair in pairs if pair[0]["source"]["table"] == "types"]
    assert empty[0]["after"] == empty[1]["after"]
    mine, other = full[0]["after"], full[1]["after"]
    assert mine.keys() == other.keys()
    differing = {name for name in mine if mine[name] != other[name] or type(mine[name]) is not type(other[name])}
    types = dict(
        world.rows("select attname, format_type(atttypid, null) from pg_attribute where attrelid = 'types'::regclass")
    )
    _, _, page = PAGE.read_text().partition("These types have another form in Debezium:\n\n")
    rows = re.findall(r"^\| ((?:`[a-z ]+`(?:, )?)+) \| .+ \| .+ \|$", page.partition("\n\n")[0], re.MULTILINE)
    listed = {name for names in rows for name in re.findall(r"`([a-z ]+)`", names)}
    assert listed == {types[name] for name in differing}
    assert not {types[name] for name in mine if name not in differing} & listed
