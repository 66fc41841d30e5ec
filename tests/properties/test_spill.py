"""Transactions in progress, against a model: whatever comes between what, each comes whole at its commit, or not at all."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.changes import in_progress as spill
from cdcbridge.changes.in_progress import Spill
from cdcbridge.errors import DecodeError


class Server:
    """A source that gives what it was told to, a few messages at a time, and a store that is slow."""

    def __init__(self, messages: list[bytes], sizes: Iterator[int]) -> None:
        self._messages = messages
        self._sizes = sizes
        self.drained = False
        self.blocks: dict[tuple[int, int], bytes] = {}
        self.pending: list[tuple[int, int, bytes]] = []
        self.forgotten: list[int] = []

    def messages(self, size: int) -> Iterator[bytes]:
        for _ in range(next(self._sizes)):
            if not self._messages:
                self.drained = True
                return
            yield self._messages.pop(0)

    def put(self, xid: int, n: int, block: bytes) -> None:
        self.pending.append((xid, n, block))

    def read(self, xid: int, n: int) -> bytes:
        return self.blocks[xid, n]  # KeyError where it is not there yet

    def forget(self, xid: int) -> None:
        self.forgotten.append(xid)

    def append(self) -> Iterator[tuple[int, int]]:
        """What one append of the bridge does: blocks in, and out those that may go."""
        for xid, n, block in self.pending:
            self.blocks[xid, n] = block
            yield xid, n
        self.blocks = {key: block for key, block in self.blocks.items() if key[0] not in self.forgotten}
        self.pending.clear()
        self.forgotten.clear()


def everything(server: Server, sizes: Iterator[int]) -> list[bytes]:
    put_aside = Spill(server, server.put, server.read, server.forget)
    found: list[bytes] = []
    while not put_aside.drained:
        before = len(found)
        found += put_aside.messages(next(sizes) * 10)
        if put_aside.waiting:
            assert len(found) == before or server.pending
        if put_aside.waiting or next(sizes) % 2:
            for stored in server.append():
                put_aside.stored(*stored)
    list(server.append())
    assert not server.blocks, "blocks that nobody needs"
    return found


def begin(lsn: int, xid: int) -> bytes:
    return b"B" + struct.pack("!QqI", lsn, 7, xid)


def commit(lsn: int) -> bytes:
    return b"C" + struct.pack("!BQQq", 0, lsn, lsn + 8, 7)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """(what the server sends, what must come of it)."""
    sent: list[bytes] = []
    expected: list[bytes] = []
    running: dict[int, list[tuple[int, bytes]]] = {}
    gone: set[int] = set()  # subtransactions that were rolled back, of which nothing comes any more
    lsn = next_xid = 100
    for _ in range(draw(st.integers(1, 30))):
        what = draw(st.sampled_from(["block", "block", "block", "commit", "abort", "subabort", "plain"]))
        lsn += 1
        if what == "plain":
            whole = [begin(lsn, 9), b"I" + draw(st.binary(max_size=8)), commit(lsn)]
            sent += whole
            expected += whole
        elif what == "block" or not running:
            xid = draw(st.sampled_from([*running, next_xid]))
            next_xid += 10 * (xid == next_xid)
            sent.append(b"S" + struct.pack("!IB", xid, xid not in running))
            rows = running.setdefault(xid, [])
            for _ in range(draw(st.integers(0, 6))):
                subxid = draw(st.sampled_from([x for x in (xid, xid + 1, xid + 2) if x not in gone]))
                content = draw(st.binary(max_size=40))
                sent.append(b"I" + struct.pack("!I", subxid) + content)
                rows.append((subxid, b"I" + content))
            sent.append(b"E")
        else:
            xid = draw(st.sampled_from([*running]))
            if what == "commit":
                sent.append(b"c" + struct.pack("!IBQQq", xid, 0, lsn, lsn + 8, 7))
                expected += [begin(lsn, xid), *(m for _, m in running.pop(xid)), commit(lsn)]
            elif what == "abort":
                sent.append(b"A" + struct.pack("!II", xid, xid))
                del running[xid]
            else:
                subxid = xid + draw(st.integers(1, 2))
                gone.add(subxid)
                sent.append(b"A" + struct.pack("!II", xid, subxid))
                running[xid] = [(sub, m) for sub, m in running[xid] if sub != subxid]
    for xid in running:
        sent.append(b"A" + struct.pack("!II", xid, xid))
    return sent, expected


@given(history=histories(), chance=st.randoms(use_true_random=False), block=st.integers(1, 60))
def test_each_comes_whole_at_its_commit_or_not_at_all(
    history: tuple[list[bytes], list[bytes]], chance: object, block: int
) -> None:
    sent, expected = history
    sizes = iter(lambda: chance.randint(1, 5), 0)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill, "BLOCK_BYTES", block)
        patch.setattr(spill, "MOST_BYTES", 2 * block)
        assert everything(Server(list(sent), sizes), sizes) == expected


@pytest.mark.parametrize(
    "messages",
    [
        [b"S"],
        [b"c" + struct.pack("!IBQQq", 5, 0, 1, 2, 3)],
        [b"S" + struct.pack("!IB", 5, 1), b"I\0\0"],
        [b"S" + struct.pack("!IB", 5, 1), b"E", b"A\0"],
        [b"S" + struct.pack("!IB", 5, 1), b"E", b"c\0\0"],
    ],
)
def test_what_makes_no_sense_is_a_decode_error(messages: list[bytes]) -> None:
    sizes = iter(lambda: 3, 0)
    with pytest.raises(DecodeError):
        everything(Server(messages, sizes), sizes)
