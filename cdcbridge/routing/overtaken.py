"""Rows that a backfill read, and which of them the stream has overtaken. Pure.

A chunk is read with a snapshot, while the stream goes on. What a transaction changed that this snapshot does not see
comes through the stream, so of such keys the chunk's rows are stale: a watch notes the keys that the stream brings,
with the transaction, and forgets those that a snapshot sees. The chunk enters the log once the stream has passed the
watermark that was written after it was read: by then the stream has brought all that the chunk could have missed, and
what comes later is younger.

Source: PostgreSQL manual, "System Information Functions" (pg_snapshot). The way of watermarks: A. Andreakis and
I. Papapanagiotou, "DBLog: A Watermark Based Change-Data-Capture Framework" (2020); snapshots instead of a low
watermark, because a transaction whose commit stands in the WAL may be invisible for a while yet.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Final

from cdcbridge.routing.subscription import Subscription

WATERMARK_PREFIX: Final = "cdcbridge.watermark"
EARLY_LIMIT: Final = 100_000  # keys; beyond that a row may come as a change and as a read
_HALF: Final = 1 << 31
_XIDS: Final = 1 << 32


@dataclass(slots=True, frozen=True)
class Snapshot:
    """pg_current_snapshot(): who had committed. Transaction IDs are 64 bits wide, with the epoch."""

    xmin: int
    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """`xmin:xmax:xip,xip`. Raises ValueError."""
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(map(int, running.split(",") if running else ())))

    def certain(self) -> Snapshot:
        """What is visible in any case. On a standby nobody is listed as running who is."""
        return Snapshot(self.xmin, self.xmin, frozenset())

    def sees(self, xid: int) -> bool:
        """Whether what the transaction did is visible. `xid`: of one that committed, without its epoch, as streamed."""
        ahead = (xid - self.xmax) % _XIDS
        if ahead < _HALF:
            return False
        whole = self.xmax + ahead - _XIDS
        return whole < self.xmin or whole not in self.running


class Stale:
    """A set of keys, or all there are."""

    def __init__(self, changed: Container[str | None], early: Container[str | None], *, everything: bool) -> None:
        self._changed = changed
        self._early = early
        self._everything = everything

    def __contains__(self, key: object) -> bool:
        return self._everything or key in self._changed or key in self._early


@dataclass(slots=True, eq=False)
class Watch:
    """What the stream has brought of a table since its backfill began in this session, as far as `subscription`, the
    consumer it is for, takes it. `topic`: the table's. `over`: nothing of it may enter the log any more.
    """

    subscription: Subscription
    topic: str
    changed: dict[str | None, int] = field(default_factory=dict)  # key → the last transaction that changed it
    truncated: int | None = None
    before: frozenset[str | None] = frozenset()  # keys that came as changes before the watch began
    early: frozenset[str | None] | None = None  # keys changed before the first chunk of all: these rows came already
    visible: Snapshot | None = None  # while nothing is read yet, from time to time: every later snapshot sees as much
    over: bool = False
    _limit: int = EARLY_LIMIT

    def note(self, op: str, keys: tuple[str | None, ...], xid: int) -> None:
        """A change that the consumer takes: of its key, and of the one that it took away."""
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
        """The first chunk of all enters: what has changed until now came as a change, whatever a later chunk sees."""
        early = self.before.union(self.changed)
        self.early = early if len(early) < EARLY_LIMIT else frozenset()
        return list(self.early)

    def stale(self, snapshot: Snapshot) -> Stale:
        """Keys whose rows, read with this snapshot, must not enter the log."""
        self._forget(snapshot)
        truncated = self.truncated is not None and not snapshot.sees(self.truncated)
        return Stale(self.changed, self.early or frozenset(), everything=truncated)

    def _forget(self, snapshot: Snapshot) -> None:
        """What a snapshot sees, every later one does."""
        self.changed = {key: xid for key, xid in self.changed.items() if not snapshot.sees(xid)}


@dataclass(slots=True, eq=False)
class Chunk:
    """Rows of one table, read with `snapshot`.

    `rows`: key and data, each with its length as COPY has it, then the consumer's own key if it has one.
    `sized`: then also the least size of a row that was not loaded, or null.
    `place`: the last row's key as texts, after which the next chunk begins. `looked_at`: how many rows that took.
    `last`: the backfill is done with it.
    `release`: to be called when it is durable, or dropped.
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
    early: list[str | None] | None = None  # with the first chunk of all: the watch's, to be remembered
