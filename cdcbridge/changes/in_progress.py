"""Set aside transactions that the source sends before their commit, and yield them when they commit.

With protocol version 2, pgoutput sends a large transaction while it is in progress. This module packs its messages into
blocks, and the blocks are written to the store. When the transaction commits, the module yields Begin, the messages and
Commit, as if the server had sent them only then. Messages of subtransactions that were rolled back are left out. The
later stages cannot see the difference, and the positions are the same.

Memory contains at most one block per transaction and MOST_BYTES of blocks in all, and a number for each subtransaction
that was rolled back. This module is pure. Never yields a message of a transaction that has not committed.

Source: PostgreSQL manual, "Logical Replication Message Formats", Stream Start to Stream Abort.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from cdcbridge.errors import DecodeError, SentTooEarly

BLOCK_BYTES: Final = 256 << 10
MOST_BYTES: Final = 4 << 20  # of blocks that are not full; at this size all of them are put into the store
_PIECE = struct.Struct("!II")  # before each message in a block: its length and its (sub)transaction
_BEGIN = struct.Struct("!cQqI")
_COMMIT = struct.Struct("!cBQQq")
_STREAM_COMMIT = struct.Struct("!cIBQQq")
_U32 = struct.Struct("!I").unpack_from
_OURS: Final = frozenset((b"S", b"c", b"A"))  # Stream Start, Commit, Abort; all between Start and Stop are ours, too


class MessageSource(Protocol):
    """The source of the plugin's messages.

    `drained` is true when no more messages have arrived.
    """

    drained: bool

    def messages(self, size: int) -> Iterator[bytes]:
        """Yield messages that have arrived, about `size` bytes of them."""


@dataclass(slots=True)
class _Streamed:
    """A transaction in progress.

    Attributes:
        blocks: The number of blocks that were given to `put`.
        pieces: The content of the next block.
        size: The bytes of the messages in `pieces`.
        aborted: The subtransactions that were rolled back.
        messages: The transaction contains logical messages.
    """

    blocks: int = 0
    pieces: list[bytes] = field(default_factory=list)
    size: int = 0
    aborted: set[int] = field(default_factory=set)
    messages: bool = False


@dataclass(slots=True)
class _Turn:
    """A transaction in progress that has committed, and whose messages are now being yielded.

    Attributes:
        xid: Its transaction id.
        transaction: Its blocks and messages.
        commit: Its Commit message.
        block: The number of the next block.
        pieces: The unread part of the current block.
    """

    xid: int
    transaction: _Streamed
    commit: bytes
    block: int = 0
    pieces: Iterator[tuple[int, bytes]] = field(default_factory=lambda: iter(()))


class Spill:
    """The source's messages, in the order in which their transactions committed.

    Args:
        source: The messages as they arrive.
        put: Takes (xid, n, block), and writes the block to the store later. stored() reports each block that is
            written.
        read: Takes (xid, n), and returns that block from the store.
        forget: Takes a transaction id when the blocks of that transaction are not needed any more.
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
        self._current: int | None = None  # the transaction whose messages arrive now
        self._buffered = 0
        self._away: set[tuple[int, int]] = set()  # blocks that were given to put() and are not stored yet
        self._turn: _Turn | None = None

    @property
    def drained(self) -> bool:
        """True while there is nothing more to read, and no committed transaction to yield."""
        return self._turn is None and self._source.drained

    @property
    def waiting(self) -> bool:
        """True while the next block of the committed transaction is not in the store yet."""
        return self._turn is not None and (self._turn.xid, self._turn.block) in self._away

    def stored(self, xid: int, n: int) -> None:
        """Note that the store has block `n` of a transaction, so that it can be read back."""
        self._away.discard((xid, n))

    def messages(self, size: int) -> Iterator[bytes]:
        """Yield about `size` bytes of messages, or none while `waiting` is true.

        Raises:
            DecodeError: The source breaks the protocol.
            SentTooEarly: Logical messages that were rolled back cannot be found among the others of their transaction.
        """
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
        """Handle a message of a transaction in progress, or one about such a transaction."""
        kind = message[:1]
        try:
            if self._current is not None:
                if kind == b"E":
                    self._current = None
                elif kind != b"O":  # an Origin has no (sub)transaction and no use here
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
        """Add a message to the next block of its transaction.

        The four bytes after the message's first byte contain its (sub)transaction. Without these four bytes, the
        message is the same as one that is sent after the commit.
        """
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
        """Note that a subtransaction was rolled back, or drop the whole transaction if that was rolled back."""
        transaction = self._open.get(xid)
        if transaction is None:
            return
        if subxid != xid:
            if transaction.messages:
                # The server sends the transaction of a logical message, but not its subtransaction.
                reason = f"transaction {xid} has logical messages, and its subtransaction {subxid} was rolled back"
                raise SentTooEarly(f"source: {reason}. The bridge starts again, and gets it after its commit")
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
                "pgoutput", f"Stream Commit of transaction {xid}, of which no part was received", lsn=commit_lsn
            )
        self._turn = _Turn(xid, transaction, _COMMIT.pack(b"C", flags, commit_lsn, end_lsn, time))
        self._turn.pieces = iter([(xid, _BEGIN.pack(b"B", commit_lsn, time, xid))])

    def _bring_back(self, turn: _Turn, size: int) -> Iterator[bytes]:
        """Yield messages of the committed transaction, from the point at which the last call stopped.

        The order is: the rest of the current block, the blocks in the store, the block that never left memory, the
        Commit.
        """
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
    """Yield each (subtransaction, message) in a block."""
    position = 0
    while position < len(block):
        length, subxid = _PIECE.unpack_from(block, position)
        position += _PIECE.size
        yield subxid, block[position : position + length]
        position += length
