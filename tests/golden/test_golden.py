"""Both plugins' captures of one SQL script, and the one result that both must decode to."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from cdcbridge.changes.events import Begin, Change, Commit, Event, LogicalMessage, Relation, Truncate
from cdcbridge.changes.keys import key_text
from cdcbridge.changes.pgoutput import PgoutputDecoder
from cdcbridge.changes.pgtypes import Types
from cdcbridge.changes.wal2json import TableShape, Wal2jsonDecoder
from cdcbridge.routing.copy_format import encode_data

FOLDER = Path(__file__).parent
ID = frozenset({"id"})
ODD = ("Key", 'a "b"')
# What the catalogue said of the script's tables.
TABLES = {
    "plain": TableShape(
        Relation("public", "plain", "public.plain", ("id",), ID), True, toastable=("v", "n", "b", "a", "j")
    ),
    "big": TableShape(Relation("public", "big", "public.big", ("id",), ID), True, toastable=("v", "body")),
    "whole": TableShape(
        Relation("public", "whole", "public.whole", None, frozenset(), full=True), True, toastable=("v", "body")
    ),
    "Odd Name": TableShape(
        Relation("public", "Odd Name", "public.Odd Name", ODD, frozenset(ODD)), True, toastable=ODD[1:]
    ),
    "parts": TableShape(Relation("public", "parts", "public.parts", ("id",), ID), True, toastable=("v",)),
    "parts_1": TableShape(Relation("public", "parts_1", "public.parts", ("id",), ID), True, True, toastable=("v",)),
    "parts_2": TableShape(Relation("public", "parts_2", "public.parts", ("id",), ID), True, True, toastable=("v",)),
    "made": TableShape(Relation("public", "made", "public.made", ("id",), ID), True, generated=frozenset({"twice"})),
}


class Catalog:
    """The catalogue as it was at the capture."""

    def captures(self, schema: str, table: str) -> bool:
        return True

    def advance(self, begin: Begin) -> bool:
        return False

    def table(self, schema: str, table: str, action: str, columns: dict[str, int]) -> TableShape:
        return TABLES[table]


def events(plugin: str) -> list[Event]:
    lines = (FOLDER / f"{plugin}.txt").read_bytes().splitlines()
    if plugin == "wal2json":
        return list(Wal2jsonDecoder(Types(), Catalog()).events(lines))
    return list(PgoutputDecoder(Types(), Catalog()).events(base64.b64decode(line) for line in lines))


def texts(found: Iterable[Event]) -> Iterator[str]:
    """topic, key and data of each message, separated by tabs."""
    for event in found:
        if isinstance(event, Change):
            key = key_text(event.record, event.relation.key)
            data = encode_data(event.op, event.record, event.old, event.unchanged)
            yield f"{event.relation.topic}\t{key or ''}\t{data.decode()}"
        elif isinstance(event, Truncate):
            for relation in event.relations:
                yield f"{relation.topic}\t\t{encode_data('truncate', None, None, ()).decode()}"
        elif isinstance(event, LogicalMessage):
            yield f"message\t{event.prefix}\t{event.content.decode()}"


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
def test_a_capture_decodes_to_the_one_result(plugin: str) -> None:
    assert list(texts(events(plugin))) == (FOLDER / "expected.txt").read_text().splitlines()


def test_both_captures_have_the_same_transactions() -> None:
    """The same commit LSNs, ends, xids and times; wal2json sends empty transactions, too."""

    def transactions(plugin: str) -> dict[object, tuple[object, ...]]:
        frames = [e for e in events(plugin) if isinstance(e, Begin | Commit)]
        pairs = zip(frames[::2], frames[1::2], strict=True)
        return {
            begin.commit_lsn: (begin.xid, begin.commit_time, commit.end_lsn)
            for begin, commit in pairs
            if isinstance(begin, Begin) and isinstance(commit, Commit)
        }

    ours, theirs = transactions("wal2json"), transactions("pgoutput")
    assert theirs and theirs.items() <= ours.items()
