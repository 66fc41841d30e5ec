"""Decoders against an enemy: cut anywhere, with any byte changed, with rubbish behind: an event or a DecodeError."""

from __future__ import annotations

import contextlib
import struct

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.changes.events import Begin, Change, Relation
from cdcbridge.changes.pgoutput import PgoutputDecoder
from cdcbridge.changes.pgtypes import Types
from cdcbridge.changes.wal2json import TableShape, Wal2jsonDecoder
from cdcbridge.errors import DecodeError

T = Relation("public", "t", "public.t", ("id",), frozenset({"id"}))


class Everything:
    """A catalogue that captures every table and knows its key."""

    def captures(self, schema: str, table: str) -> bool:
        return True

    def advance(self, begin: Begin) -> bool:
        return False

    def table(self, schema: str, table: str, action: str, columns: dict[str, int]) -> TableShape:
        return TableShape(T, captured=True)


def _text(value: str) -> bytes:
    return value.encode() + b"\0"


def _field(value: bytes | None) -> bytes:
    return b"n" if value is None else b"t" + struct.pack("!I", len(value)) + value


RELATION = (
    b"R" + struct.pack("!I", 5) + _text("public") + _text("t") + b"d" + struct.pack("!H", 3)
    + b"\1" + _text("id") + struct.pack("!Ii", 23, -1)
    + b"\0" + _text("v") + struct.pack("!Ii", 25, -1)
    + b"\0" + _text("n") + struct.pack("!Ii", 1700, -1)
)  # fmt: skip
ROW = struct.pack("!H", 3) + _field(b"1") + _field("ü".encode()) + _field(b"1.50")
KEY = struct.pack("!H", 3) + _field(b"1") + b"nn"
PGOUTPUT = {
    "begin": b"B" + struct.pack("!QqI", 100, 5, 7),
    "commit": b"C" + struct.pack("!BQQq", 0, 100, 110, 5),
    "insert": b"I" + struct.pack("!I", 5) + b"N" + ROW,
    "update": b"U" + struct.pack("!I", 5) + b"K" + KEY + b"N" + ROW,
    "delete": b"D" + struct.pack("!I", 5) + b"K" + KEY,
    "truncate": b"T" + struct.pack("!IBI", 1, 0, 5),
    "message": b"M" + struct.pack("!BQ", 1, 99) + _text("prefix") + struct.pack("!I", 3) + b"abc",
    "type": b"Y" + struct.pack("!I", 9) + _text("public") + _text("mood"),
    "origin": b"O" + struct.pack("!Q", 1) + _text("elsewhere"),
    "relation": RELATION,
}
HEAD = '"xid":7,"timestamp":"2024-01-01 00:00:00.5+00","lsn":"0/64"'
COLUMNS = '[{"name":"id","typeoid":23,"value":1},{"name":"n","typeoid":1700,"value":1.50}]'
IDENTITY = '[{"name":"id","typeoid":23,"value":1}]'
WAL2JSON = {
    "begin": f'{{"action":"B",{HEAD},"nextlsn":"0/70"}}',
    "commit": f'{{"action":"C",{HEAD},"nextlsn":"0/70"}}',
    "insert": f'{{"action":"I",{HEAD},"schema":"public","table":"t","columns":{COLUMNS}}}',
    "update": f'{{"action":"U",{HEAD},"schema":"public","table":"t","columns":{COLUMNS},"identity":{IDENTITY}}}',
    "delete": f'{{"action":"D",{HEAD},"schema":"public","table":"t","identity":{IDENTITY}}}',
    "truncate": f'{{"action":"T",{HEAD},"schema":"public","table":"t"}}',
    "message": f'{{"action":"M",{HEAD},"transactional":true,"prefix":"p","content":"abc"}}',
}
MESSAGES = [("pgoutput", name, message) for name, message in PGOUTPUT.items()]
MESSAGES += [("wal2json", name, message.encode()) for name, message in WAL2JSON.items()]
each_message = pytest.mark.parametrize(
    ("plugin", "name", "message"), MESSAGES, ids=lambda v: v if isinstance(v, str) else ""
)


def decode(plugin: str, message: bytes) -> object:
    """The event of one message, None where it is none; for pgoutput after a Relation message."""
    if plugin == "wal2json":
        (event,) = Wal2jsonDecoder(Types(), Everything(), lambda: 0x1A).events([message])
        return event
    _relation, *events = PgoutputDecoder(Types(), Everything(), lambda: 0x1A).events([RELATION, message])
    return events[0] if events else None


@each_message
def test_a_whole_message_is_read(plugin: str, name: str, message: bytes) -> None:
    event = decode(plugin, message)
    assert (event is None) == (name in ("type", "origin"))


@each_message
def test_a_message_cut_anywhere_is_a_decode_error_with_plugin_offset_and_lsn(
    plugin: str, name: str, message: bytes
) -> None:
    for end in range(len(message)):
        with pytest.raises(DecodeError) as raised:
            decode(plugin, message[:end])
        assert raised.value.plugin == plugin
        assert raised.value.lsn == 0x1A and "0/1A" in str(raised.value)
        assert 0 <= raised.value.offset <= len(message)


@each_message
def test_rubbish_behind_a_message_is_a_decode_error(plugin: str, name: str, message: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(plugin, message + b"x")


@each_message
@given(data=st.data())
def test_any_changed_byte_is_an_event_or_a_decode_error(
    plugin: str, name: str, message: bytes, data: st.DataObject
) -> None:
    changed = bytearray(message)
    changed[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DecodeError):
        decode(plugin, bytes(changed))


@pytest.mark.parametrize("plugin", ["pgoutput", "wal2json"])
@given(rubbish=st.binary(max_size=60))
def test_rubbish_is_a_decode_error(plugin: str, rubbish: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(plugin, rubbish)


def test_a_change_of_an_unnamed_relation_is_a_decode_error() -> None:
    with pytest.raises(DecodeError, match="which no Relation message named"):
        list(PgoutputDecoder(Types(), Everything()).events([PGOUTPUT["insert"]]))


def test_a_numeric_of_a_hundred_digits_keeps_them_and_a_text_that_looks_like_one_too() -> None:
    digits = "9" * 60 + "." + "1" * 40
    trap = r"\"typeoid\":1700,\"value\":1.50"
    line = WAL2JSON["insert"].replace("1.50", digits)
    line = line.replace('"columns":[', f'"columns":[{{"name":"t","typeoid":25,"value":"{trap}"}},')
    event = decode("wal2json", line.encode())
    assert isinstance(event, Change)
    assert orjson.dumps(event.record) == b'{"t":"%s","id":1,"n":%s}' % (trap.encode(), digits.encode())
