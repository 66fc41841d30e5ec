"""Find the rows that a backfill read and the stream has overtaken, so that no old row follows a newer change.

A chunk is read with a snapshot while the stream continues. Changes of transactions that this snapshot does not see
arrive through the stream, so the chunk's rows with the same keys are stale. A watch notes the keys that the stream
brings, each with its transaction, and forgets the keys of transactions that a snapshot sees.

After a chunk was read, a watermark is written into the WAL. The chunk enters the log once the stream has passed it. By
then the stream has brought every change that the chunk could have missed, and all later changes are newer than the
chunk. The module is pure and never reads a table itself.

Source: PostgreSQL manual, "System Information Functions" (pg_snapshot). The idea of watermarks: A. Andreakis and
I. Papapanagiotou, "DBLog: A Watermark Based Change-Data-Capture Framework" (2020). Snapshots replace its low watermark,
because a transaction whose commit is already in the WAL may remain invisible for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Final

from cdcbridge.routing.subscription import Subscription

WATERMARK_PREFIX: Final = "cdcbridge.watermark"
EARLY_LIMIT: Final = 100_000  # keys; with more, a row may arrive as a change and again as a read
_HALF: Final = 1 << 31
_XIDS: Final = 1 << 32


@dataclass(slots=True, frozen=True)
class Snapshot:
    """The result of pg_current_snapshot(): which transactions had committed.

    Transaction IDs have 64 bits, with the epoch.
    """

    xmin: int
    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """Read a text like `xmin:xmax:xip,xip`.

        Raise ValueError if the text has another form.
        """
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(map(int, running.split(",") if running else ())))

    def certain(self) -> Snapshot:
        """Return a snapshot that sees only the transactions that are certainly visible.

        A snapshot of a standby does not list the transactions that are running.
        """
        return Snapshot(self.xmin, self.xmin, frozenset())

    def sees(self, xid: int) -> bool:
        """Return whether the changes of a committed transaction are visible.

        Args:
            xid: The transaction's ID without its epoch, as the stream has it.
        """
        ahead = (xid - self.xmax) % _XIDS
        if ahead < _HALF:
            return False
        whole = self.xmax + ahead - _XIDS
        return whole < self.xmin or whole not in self.running


class Stale:
    """The keys of stale rows: a set of keys, or after a truncate all keys."""

    def __init__(self, changed: Container[str | None], early: Container[str | None], *, everything: bool) -> None:
        self._changed = changed
        self._early = early
        self._everything = everything

    def __contains__(self, key: object) -> bool:
        return self._everything or key in self._changed or key in self._early


@dataclass(slots=True, eq=False)
class Watch:
    """The changes of one table that the stream has brought since a backfill of it began in this session.

    Only operations that the backfill's consumer takes count.

    Attributes:
        subscription: The consumer that the backfill is for.
        topic: The table's topic.
        changed: Each key, with the last transaction that changed it.
        truncated: The last transaction that truncated the table, or None.
        before: The keys that the consumer received in changes before the watch began.
        early: The keys that were changed before the first chunk of the whole backfill entered the log. The consumer
            already received their rows in changes. None: `begin()` has not found them yet.
        visible: A snapshot that is renewed from time to time while nothing is read yet. Every later snapshot sees at
            least as much.
        over: Whether the backfill has ended, so that none of its rows may enter the log any more.
    """

    subscription: Subscription
    topic: str
    changed: dict[str | None, int] = field(default_factory=dict)
    truncated: int | None = None
    before: frozenset[str | None] = frozenset()
    early: frozenset[str | None] | None = None
    visible: Snapshot | None = None
    over: bool = False
    _limit: int = EARLY_LIMIT

    def note(self, op: str, keys: tuple[str | None, ...], xid: int) -> None:
        """Note a change that the stream brought, if the consumer takes its operation.

        Args:
            op: The operation.
            keys: The key of the row, and the key that the change took away from it.
            xid: The transaction's ID without its epoch.
        """
        if op not in self.subscription.operations:
            return
        if op == "truncate":
            self.truncated = xid
        for key in keys:
            self.changed[key] = xid
        if len(self.changed) > self._limit and self.visible is not None:
            self._forget(self.visible)
            self._limit = 2 * max(len(self.changed), EARLY_LIMIT)

    def begin(self) -> list[str | None]:
        """Set and return the early keys, when the first chunk of the backfill enters the log.

        The consumer received all rows that changed until now in changes, even if a later chunk sees them. From
        EARLY_LIMIT keys on, none is kept.
        """
        early = self.before.union(self.changed)
        self.early = early if len(early) < EARLY_LIMIT else frozenset()
        return list(self.early)

    def stale(self, snapshot: Snapshot) -> Stale:
        """Return the keys whose rows must not enter the log if they were read with this snapshot."""
        self._forget(snapshot)
        truncated = self.truncated is not None and not snapshot.sees(self.truncated)
        return Stale(self.changed, self.early or frozenset(), everything=truncated)

    def _forget(self, snapshot: Snapshot) -> None:
        """Forget the keys of transactions that this snapshot sees, because every later snapshot sees them, too."""
        self.changed = {key: xid for key, xid in self.changed.items() if not snapshot.sees(xid)}


@dataclass(slots=True, eq=False)
class Chunk:
    """Rows of one table that a backfill read.

    Attributes:
        watch: The watch of the table.
        backfill_id: The backfill.
        snapshot: The snapshot that the rows were read with.
        rows: Each has its key and data in COPY's format, then the consumer's own key if it has one.
        place: The place after which the next chunk begins: the last row's key as texts. For a table without a key:
            leaf, page and item.
        looked_at: How many rows were looked at to make the chunk.
        last: Whether it is the backfill's last chunk.
        release: Is called when the chunk is durable, or was dropped.
        sized: Whether each row has one more field: the least size of a row that was not loaded, or null.
        early: With the first chunk of the whole backfill: the early keys of the watch, to be stored.
    """

    watch: Watch
    backfill_id: int
    snapshot: Snapshot
    rows: list[bytes]
    place: list[object]
    looked_at: int
    last: bool
    release: Callable[[], None]
    sized: bool = False
    early: list[str | None] | None = None
