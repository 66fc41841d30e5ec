"""pgoutput, message by message. tests/golden has a whole stream, tests/properties/test_decoders.py damaged ones."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import orjson
import pytest

from cdcbridge.changes.events import Begin, Change, Commit, Ignored, LogicalMessage, Relation, Truncate
from cdcbridge.changes.pgoutput import PgoutputDecoder
from cdcbridge.changes.pgtypes import Types
from cdcbridge.changes.wal2json import TableShape
from cdcbridge.errors import DecodeError

COLUMNS = (("id", 23), ("v", 25), ("n", 1700))


class Catalog:
    def __init__(self, table: TableShape | None) -> None:
        self._table = table

    def captures(self, schema: str, table: str) -> bool:
        return self._table is not None

    def advance(self, begin: Begin) -> bool:
        return False

    def table(self, schema: str, table: str, action: str, columns: dict[str, int]) -> TableShape:
        assert self._table is not None
        return self._table


PRIMARY = ("id",)


def known(primary: tuple[str, ...] = PRIMARY, index: tuple[str, ...] = (), generated: Iterable[str] = ()) -> TableShape:
    relation = Relation("public", "t", "public.t", primary, frozenset(primary))
    return TableShape(relation, True, generated=frozenset(generated), primary_key=primary, identity_order=index)


def relation(kind: str = "d", identity: tuple[str, ...] = PRIMARY, oid: int = 5) -> bytes:
    head = b"R" + struct.pack("!I", oid) + b"public\0t\0" + kind.encode() + struct.pack("!H", len(COLUMNS))
    parts = [
        bytes([name in identity]) + name.encode() + b"\0" + struct.pack("!Ii", type_, -1) for name, type_ in COLUMNS
    ]
    return head + b"".join(parts)


def row(*values: str | None) -> bytes:
    """Values as text. None is null, and "?" was not carried."""
    parts = [b"n" if v is None else b"u" if v == "?" else b"t" + struct.pack("!I", len(v)) + v.encode() for v in values]
    return struct.pack("!H", len(values)) + b"".join(parts)


def change(action: str, *parts: bytes, oid: int = 5) -> bytes:
    return action.encode() + struct.pack("!I", oid) + b"".join(parts)


def decoded(*messages: bytes, table: TableShape | None = None, captured: bool = True) -> list[Any]:
    catalog = Catalog((table or known()) if captured else None)
    return list(PgoutputDecoder(Types(), catalog).events(messages))


def plain(found: Change) -> tuple[Any, ...]:
    return found.op, *orjson.loads(orjson.dumps([found.record, found.old, found.unchanged]))


FULL_ROW, KEY_ROW = row("1", "a", "1.50"), row("1", None, None)
NEW = {"id": 1, "v": "a", "n": 1.5}


@pytest.mark.parametrize(
    ("kind", "message", "expected"),
    [
        ("d", change("I", b"N", FULL_ROW), ("insert", NEW, None, [])),
        ("d", change("I", b"N", row("1", None, "NaN")), ("insert", {"id": 1, "v": None, "n": "NaN"}, None, [])),
        ("d", change("U", b"N", FULL_ROW), ("update", NEW, None, [])),
        ("d", change("U", b"N", row("1", "?", "1.50")), ("update", {"id": 1, "n": 1.5}, None, ["v"])),
        ("d", change("U", b"K", row("2", None, None), b"N", FULL_ROW), ("update", NEW, {"id": 2}, [])),
        ("f", change("U", b"O", row("1", "b", None), b"N", FULL_ROW), ("update", NEW, {"id": 1, "v": "b", "n": None}, [])),
        ("f", change("U", b"O", FULL_ROW, b"N", row("1", "?", "2")),
         ("update", {"id": 1, "v": "a", "n": 2}, NEW, [])),
        ("d", change("D", b"K", KEY_ROW), ("delete", {"id": 1}, None, [])),
        ("f", change("D", b"O", FULL_ROW), ("delete", NEW, None, [])),
    ],
)  # fmt: skip
def test_a_row(kind: str, message: bytes, expected: tuple[Any, ...]) -> None:
    _, found = decoded(relation(kind), message)
    assert plain(found) == expected


def test_a_key_that_was_sent_because_it_is_stored_out_of_line_did_not_change() -> None:
    update = change("U", b"K", row(None, "a", None), b"N", row("1", "?", "1.50"))
    _, found = decoded(relation("i", ("v",)), update, table=known(index=("v",)))
    assert plain(found) == ("update", NEW, None, [])


def test_what_is_no_row() -> None:
    found = decoded(
        b"B" + struct.pack("!QqI", 100, 5, 7), b"C" + struct.pack("!BQQq", 0, 100, 110, 5), b"O" + bytes(8) + b"x\0",
        b"Y" + bytes(4) + b"public\0mood\0", b"M" + struct.pack("!BQ", 1, 99) + b"p\0" + struct.pack("!I", 2) + b"ab",
    )  # fmt: skip
    assert found == [Begin(100, 7, 5), Commit(110, 100), LogicalMessage(True, "p", b"ab", 99)]


@pytest.mark.parametrize(
    ("kind", "identity", "table", "key"),
    [
        ("d", ("id",), known(), ("id",)),
        ("f", (), known(), ("id",)),
        ("f", (), known(()), None),
        ("n", (), known(()), None),
        ("i", ("v",), known(index=("v",)), ("v",)),
        ("d", ("id", "v"), known(("v", "id")), ("v", "id")),  # in the order of the index
        ("d", ("id", "v"), known(("id",)), ("id", "v")),
        ("d", ("v",), known(("id",)), ("v",)),  # the key as it was then, whatever the catalogue says now
    ],
)
def test_the_key_of_a_relation(
    kind: str, identity: tuple[str, ...], table: TableShape, key: tuple[str, ...] | None
) -> None:
    (found,) = decoded(relation(kind, identity), table=table)
    assert (found.topic, found.key, found.full) == ("public.t", key, kind == "f")
    assert found.columns == {"id", "v", "n"}


def test_generated_columns_are_nobodys() -> None:
    found, inserted = decoded(relation(), change("I", b"N", FULL_ROW), table=known(generated=["v"]))
    assert found.columns == {"id", "n"} and set(inserted.record) == {"id", "n"}


def test_a_table_that_nobody_takes_keeps_its_ordinals() -> None:
    found = decoded(relation(), change("I", b"N", FULL_ROW), b"T" + struct.pack("!IBI", 1, 0, 5), captured=False)
    assert found == [Ignored(), Truncate((), 1)]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (b"", "empty message"),
        (b"Z", "unknown message type"),
        (change("I", b"N", FULL_ROW, oid=6), "a change of relation 6, which no Relation message named"),
        (change("I", b"K", FULL_ROW), "INSERT without a new row"),
        (change("U", b"X"), "UPDATE without a new row"),
        (change("D", b"N", FULL_ROW), "DELETE without an old row"),
        (change("I", b"N", row("1")), "1 values for 3 columns"),
        (change("I", b"N", FULL_ROW, b"x"), "followed by unknown bytes"),
        (change("I", b"N", FULL_ROW[:-1]), "cut off"),
        (b"T" + struct.pack("!IBI", 1, 0, 6), "TRUNCATE of relation 6"),
    ],
)
def test_what_is_no_message_is_refused(message: bytes, said: str) -> None:
    with pytest.raises(DecodeError, match=said):
        decoded(relation(), message)
