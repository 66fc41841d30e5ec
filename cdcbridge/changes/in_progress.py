"""Transactions that the source sends before they are committed (pgoutput, protocol 2): aside, and back in their turn.
Pure.

Source: PostgreSQL manual, "Logical Replication Message Formats", Stream Start to Stream Abort. What comes of a
transaction in progress is kept in blocks, which go to the store; when it commits, they come back as if it had been sent
then: Begin, its messages without those of subtransactions that were rolled back, Commit. So nothing behind this knows
the difference, and positions are the same. Memory holds a block per transaction and no more than MOST_BYTES of them,
and a number for each subtransaction that was rolled back. Never shows a message of a transaction that has not
committed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from cdcbridge.errors import DecodeError, SentTooEarly

BLOCK_BYTES: Final = 256 << 10
MOST_BYTES: Final = 4 << 20  # of blocks that are not full; then all of them go
_PIECE = struct.Struct("!II")  # of a block: a message's length, its (sub)transaction
_BEGIN = struct.Struct("!cQqI")
_COMMIT = struct.Struct("!cBQQq")
_STREAM_COMMIT = struct.Struct("!cIBQQq")
_U32 = struct.Struct("!I").unpack_from
_OURS: Final = frozenset((b"S", b"c", b"A"))  # Stream Start, Commit and Abort; between Start and Stop everything is


class MessageSource(Protocol):
    """Where the plugin's messages come from."""

    drained: bool

    def messages(self, size: int) -> Iterator[bytes]:
        """Some that have arrived, about `size` bytes."""


@dataclass(slots=True)
class _Streamed:
    """One in progress: how many blocks it has given away, what it has of the next, what was rolled back of it."""

    blocks: int = 0
    pieces: list[bytes] = field(default_factory=list)
    size: int = 0
    aborted: set[int] = field(default_factory=set)
    messages: bool = False  # logical ones are among them


@dataclass(slots=True)
class _Turn:
    """One that has committed and comes now: how it ends, its next block, and what is left of the one at hand."""

    xid: int
    transaction: _Streamed
    commit: bytes
    block: int = 0
    pieces: Iterator[tuple[int, bytes]] = field(default_factory=lambda: iter(()))


class Spill:
    """The source's messages, in the order in which transactions committed.

    `put(xid, n, block)` takes a block for the store; stored() tells which are there; `read(xid, n)` gives one back;
    `forget(xid)` is called when a transaction's blocks are not needed any more.
    """

    def __init__(
        self,
        source: MessageSource,
        put: Callable[[int, int, bytes], None],
        read: Callable[[int, int], bytes],
        forget: Callable[[int], None],
    ) -> None:
        self._source, self._put, self._read, self._forget = source, put, read, forget
        self._open: dict[int, _Streamed] = {}
        self._current: int | None = None  # whose messages come now
        self._buffered = 0
        self._away: set[tuple[int, int]] = set()  # blocks that were put, and are not stored yet
        self._turn: _Turn | None = None

    @property
    def drained(self) -> bool:
        """Nothing more to read just now, and nothing to bring back."""
        return self._turn is None and self._source.drained

    @property
    def waiting(self) -> bool:
        """A transaction's turn has come, and its next block is not in the store yet."""
        return self._turn is not None and (self._turn.xid, self._turn.block) in self._away

    def stored(self, xid: int, n: int) -> None:
        """That block can be read back."""
        self._away.discard((xid, n))

    def messages(self, size: int) -> Iterator[bytes]:
        """About `size` bytes of them; none while waiting. Raises DecodeError where the protocol is not kept."""
        if self._turn is None:
            for message in self._source.messages(size):
                if self._current is None and message[:1] not in _OURS:
                    yield message  # the hot path
                    continue
                self._take(message)
                if self._turn is not None:
                    break
        if self._turn is not None:
            yield from self._bring_back(self._turn, size)

    def _take(self, message: bytes) -> None:
        """A message of a transaction in progress, or about one."""
        kind = message[:1]
        try:
            if self._current is not None:
                if kind == b"E":
                    self._current = None
                elif kind != b"O":  # which has no (sub)transaction, and says nothing of use
                    self._keep(self._current, message)
            elif kind == b"S":
                (self._current,) = _U32(message, 1)
                self._open.setdefault(self._current, _Streamed())
            elif kind == b"c":
                self._commit(message)
            else:
                self._abort(*struct.unpack_from("!II", message, 1))
        except struct.error as error:
            raise DecodeError("pgoutput", f"malformed or truncated {kind!r} message: {error}") from error

    def _keep(self, xid: int, message: bytes) -> None:
        """Its own (sub)transaction stands behind its first byte; without that it is what it would have been later."""
        transaction = self._open[xid]
        whole = len(message) - 4
        if whole < 1:
            raise DecodeError("pgoutput", f"truncated {message[:1]!r} message in a transaction in progress")
        transaction.messages = transaction.messages or message[:1] == b"M"
        transaction.pieces += (_PIECE.pack(whole, *_U32(message, 1)), message[:1], message[5:])
        transaction.size += whole
        self._buffered += whole
        if transaction.size >= BLOCK_BYTES:
            self._give_away(xid, transaction)
        elif self._buffered >= MOST_BYTES:
            for one, other in self._open.items():
                self._give_away(one, other)

    def _give_away(self, xid: int, transaction: _Streamed) -> None:
        if transaction.pieces:
            self._away.add((xid, transaction.blocks))
            self._put(xid, transaction.blocks, b"".join(transaction.pieces))
            transaction.blocks += 1
            self._empty(transaction)

    def _empty(self, transaction: _Streamed) -> None:
        self._buffered -= transaction.size
        transaction.pieces, transaction.size = [], 0

    def _abort(self, xid: int, subxid: int) -> None:
        """A subtransaction was rolled back, or all of it."""
        transaction = self._open.get(xid)
        if transaction is None:
            return
        if subxid != xid:
            if transaction.messages:
                # The server says of a logical message which transaction it is of, and not which subtransaction.
                reason = f"transaction {xid} has logical messages, and its subtransaction {subxid} was rolled back"
                raise SentTooEarly(f"source: {reason}; starting again, to get it when it has committed")
            transaction.aborted.add(subxid)
            return
        del self._open[xid]
        self._empty(transaction)
        if transaction.blocks:
            self._forget(xid)

    def _commit(self, message: bytes) -> None:
        _, xid, flags, commit_lsn, end_lsn, time = _STREAM_COMMIT.unpack(message)
        transaction = self._open.pop(xid, None)
        if transaction is None:
            raise DecodeError(
                "pgoutput", f"Stream Commit of transaction {xid}, of which nothing has come", lsn=commit_lsn
            )
        self._turn = _Turn(xid, transaction, _COMMIT.pack(b"C", flags, commit_lsn, end_lsn, time))
        self._turn.pieces = iter([(xid, _BEGIN.pack(b"B", commit_lsn, time, xid))])

    def _bring_back(self, turn: _Turn, size: int) -> Iterator[bytes]:
        """On from where the last call stopped: what is at hand, the next blocks, what never went away, the end."""
        while size > 0:
            for subxid, message in turn.pieces:
                size -= len(message)
                if subxid not in turn.transaction.aborted:
                    yield message
                if size <= 0:
                    return
            if turn.block < turn.transaction.blocks:
                if self.waiting:
                    return
                turn.pieces = _pieces(self._read(turn.xid, turn.block))
            elif turn.block == turn.transaction.blocks:
                turn.pieces = _pieces(b"".join(turn.transaction.pieces))
                self._empty(turn.transaction)
            else:
                break
            turn.block += 1
        else:
            return
        self._turn = None
        if turn.transaction.blocks:
            self._forget(turn.xid)
        yield turn.commit


def _pieces(block: bytes) -> Iterator[tuple[int, bytes]]:
    """A block → (subtransaction, message)."""
    position = 0
    while position < len(block):
        length, subxid = _PIECE.unpack_from(block, position)
        position += _PIECE.size
        yield subxid, block[position : position + length]
        position += length
