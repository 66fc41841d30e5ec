"""Transactions that are sent before they commit, message by message. tests/properties/test_spill.py tries whole streams."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from cdcbridge.changes.in_progress import Spill
from cdcbridge.errors import DecodeError, SentTooEarly

STOP = b"E"


def start(xid: int) -> bytes:
    return b"S" + struct.pack("!IB", xid, 1)


def of(xid: int, message: bytes) -> bytes:
    return message[:1] + struct.pack("!I", xid) + message[1:]


def commit(xid: int) -> bytes:
    return b"c" + struct.pack("!IBQQq", xid, 0, 100, 110, 5)


def abort(xid: int, subxid: int) -> bytes:
    return b"A" + struct.pack("!II", xid, subxid)


BEGUN, ENDED = b"B" + struct.pack("!QqI", 100, 5, 7), b"C" + struct.pack("!BQQq", 0, 100, 110, 5)


class Source:
    drained = True

    def __init__(self, messages: list[bytes]) -> None:
        self._messages = messages

    def messages(self, size: int) -> Iterator[bytes]:
        while self._messages:
            yield self._messages.pop(0)


def through(*messages: bytes) -> list[bytes]:
    spill = Spill(Source(list(messages)), lambda *_: pytest.fail("nothing is large"), lambda *_: b"", lambda _: None)
    found: list[bytes] = []
    while part := list(spill.messages(1 << 20)):
        found += part
    assert spill.drained and not spill.waiting
    return found


def test_what_is_whole_goes_through_as_it_is() -> None:
    assert through(b"B1", b"I1", b"C1") == [b"B1", b"I1", b"C1"]


def test_a_transaction_comes_at_its_commit_without_what_was_rolled_back() -> None:
    sent = [
        start(7),
        of(7, b"Ia"),
        of(8, b"Ib"),
        STOP,
        b"Bx",
        b"Cx",
        start(7),
        of(9, b"Ic"),
        STOP,
        abort(7, 8),
        commit(7),
    ]
    assert through(*sent) == [b"Bx", b"Cx", BEGUN, b"Ia", b"Ic", ENDED]


def test_a_transaction_that_was_rolled_back_leaves_nothing() -> None:
    assert through(start(7), of(7, b"Ia"), STOP, abort(7, 7), abort(9, 9)) == []


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([commit(7)], "Stream Commit of transaction 7, of which no part was received"),
        ([start(7), b"I\0\0\0"], "truncated b'I' message in a transaction in progress"),
        ([b"S\0"], "malformed or truncated b'S' message"),
        ([b"c\0"], "malformed or truncated b'c' message"),
        ([b"A\0\0\0\1"], "malformed or truncated b'A' message"),
    ],
)
def test_what_keeps_no_protocol_is_a_decode_error(messages: list[bytes], said: str) -> None:
    with pytest.raises(DecodeError, match=said):
        through(*messages)


def test_a_logical_message_of_an_unknown_subtransaction_starts_the_session_again() -> None:
    with pytest.raises(SentTooEarly, match="transaction 7 has logical messages, and its subtransaction 8 was rolled"):
        through(start(7), of(7, b"Ma"), STOP, abort(7, 8))
