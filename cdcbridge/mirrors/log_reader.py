"""Read a mirror's messages from the source's log, and the notes that the log has about transactions.

Never writes anything but the mirror's offset, its counters and its state.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from cdcbridge.config import Config, Mirror
from cdcbridge.database import connect_store, cut_off, libpq, store_errors
from cdcbridge.errors import StoreUnavailable
from cdcbridge.lsn import format_lsn, parse_lsn
from cdcbridge.mirrors.changes import MirrorChunk, MirrorRow
from cdcbridge.routing.mirror_marks import source_identity

_PREPARED: Final = {
    b"begin_mirror_read": "select wish::text, complete::text from begin_mirror_read($1)",
    b"scan_mirror": "select seq, topic, data, key, old_key, lsn, ordinal, commit_time"
    " from scan_mirror($1, $2, $3, $4, $5)",
    b"mirror_continues": "select mirror_continues($1, $2, $3)",
}
# scan_mirror() has no SET clauses, so that it is inlined. One plan serves for all reads, and reads along an index.
_SETTINGS: Final = {
    "jit": "off",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "random_page_cost": "0",
    "seq_page_cost": "0",
    "plan_cache_mode": "force_generic_plan",
}
_HEADER: Final = 8  # bytes that a stored value may have beside its text
CHUNK_ROWS: Final = 10_000
CHUNK_BYTES: Final = 4 << 20  # of stored data


@dataclass(slots=True)
class MirrorState:
    """What the store knows about a mirror.

    Attributes:
        consumer_id: The id of the consumer by which the mirror reads.
        paused: Whether a person has paused it.
        stopped: Why it has stopped until `mirror resume`, or None.
        offset: The seq up to which everything is applied or not wanted.
        target_seq: The place that the target had after the last commit, or None before the first one.
        strict_from: The seq from which on no backfill brings rows, or None.
    """

    consumer_id: int
    paused: bool
    stopped: str | None
    offset: int
    target_seq: int | None
    strict_from: int | None


@dataclass(slots=True)
class Marks:
    """The notes about the transactions of a chunk.

    Attributes:
        foreign: The commit LSNs of the transactions that any mirror applied from the target.
        peers: The commit LSNs of those that the peer applied, in rising order.
        seen: For each of these, the LSN of the target up to which its changes were applied with it.
        seen_before: The same for the last such transaction before the chunk.
        times: The effective commit times that differ from the commit time, by commit LSN.
    """

    foreign: frozenset[int]
    peers: list[int]
    seen: list[int]
    seen_before: int
    times: dict[int, int]

    def is_foreign(self, lsn: int) -> bool:
        """Return whether the transaction that committed at `lsn` came from the target."""
        return lsn in self.foreign

    def seen_by(self, lsn: int) -> int:
        """Return the LSN of the target up to which its changes were applied before `lsn`."""
        at = bisect_left(self.peers, lsn)
        return self.seen[at - 1] if at else self.seen_before


class LogReader:
    """Two sessions on the source's store, of which one only reads messages.

    Args:
        config: The configuration.
        mirror: The mirror.
    """

    def __init__(self, config: Config, mirror: Mirror) -> None:
        self._name = mirror.name
        self._peer = mirror.two_way.peer if mirror.two_way is not None else None
        self.connection = connect_store(config.store_dsn, config.store.schema_, "cdcbridge mirror")

        self._reading = connect_store(config.store_dsn, config.store.schema_, "cdcbridge mirror", _SETTINGS)
        with store_errors():
            for name, statement in _PREPARED.items():
                libpq.prepare(self._reading.pgconn, name, statement)

    def close(self) -> None:
        self._reading.close()
        self.connection.close()

    def cut_off(self) -> None:
        """Let a read() that another thread has begun end at once."""
        cut_off(self._reading)

    def identity(self) -> str:
        """Return the identity of the source.

        Raises:
            StoreUnavailable: No bridge has begun to fill the store yet.
        """
        with store_errors():
            row = self.connection.execute("select system_identifier, database_oid from source").fetchone()
        if row is None or row[1] is None:
            raise StoreUnavailable("store: no bridge has run yet", hint="`cdcbridge run` fills the store.")
        return source_identity(*row)

    def state(self) -> MirrorState | None:
        """Return the mirror's state, or None if the store does not know the mirror yet."""
        with store_errors():
            row = self.connection.execute(
                "select c.id, c.paused, m.stopped, coalesce((select min(o.seq) from newest_offsets(c.id) o), 0),"
                " m.target_seq, m.strict_from from consumers c left join mirrors m on m.consumer_id = c.id"
                " where c.name = %s and c.config ? 'mirror'",
                (self._name,),
            ).fetchone()
            if row is not None:
                self.connection.execute(
                    "insert into mirrors (consumer_id) select %s where not exists"
                    " (select from mirrors where consumer_id = %s) on conflict do nothing",
                    (row[0], row[0]),
                )
        return MirrorState(*row) if row else None

    def read(self, consumer_id: int, after: int) -> MirrorChunk:
        """Return the next messages, of complete transactions only."""
        with store_errors(), libpq.transaction(self._reading.pgconn):
            ((wish, complete),) = libpq.rows(tuple, self._reading, b"begin_mirror_read", consumer_id)
            values = (after, CHUNK_ROWS, CHUNK_BYTES, wish, complete)
            found = libpq.rows(MirrorRow._make, self._reading, b"scan_mirror", *values)
            if found and self._may_continue(found):
                last = found[-1]
                ((more,),) = libpq.rows(
                    tuple, self._reading, b"mirror_continues", consumer_id, last.seq, format_lsn(last.lsn)
                )
                return MirrorChunk(found, whole=not more)
        return MirrorChunk(found)

    @staticmethod
    def _may_continue(rows: Sequence[MirrorRow]) -> bool:
        """Return whether the chunk may have ended before its last transaction, because of its size."""
        return len(rows) == CHUNK_ROWS or sum(len(row.data) + _HEADER for row in rows) >= CHUNK_BYTES

    def end(self, consumer_id: int, after: int) -> int:
        """Return a seq up to which the mirror has no messages after `after`."""
        return int(self._one("select mirror_end(%s, %s)", consumer_id, after))

    def marks(self, rows: Sequence[MirrorRow], target: str) -> Marks:
        """Return the notes about the transactions of these messages.

        Args:
            rows: The messages of a chunk.
            target: The identity of the target.
        """
        low, high = format_lsn(rows[0].lsn), format_lsn(rows[-1].lsn)
        with store_errors():
            found = self.connection.execute(
                "select commit_lsn::text, source is not distinct from %s, case when source = %s and mirror = %s"
                " then lsn::text end, effective_time from transaction_marks"
                " where commit_lsn between %s::pg_lsn and %s::pg_lsn order by commit_lsn",
                (target, target, self._peer, low, high),
                prepare=True,
            ).fetchall()
            before = self.connection.execute(
                "select lsn::text from transaction_marks where source = %s and mirror = %s and commit_lsn < %s::pg_lsn"
                " order by commit_lsn desc limit 1",
                (target, self._peer, low),
                prepare=True,
            ).fetchone()
        known = [(parse_lsn(lsn), parse_lsn(seen)) for lsn, _, seen, _ in found if seen is not None]
        return Marks(
            frozenset(parse_lsn(lsn) for lsn, foreign, _, _ in found if foreign),
            [lsn for lsn, _ in known],
            [seen for _, seen in known],
            parse_lsn(before[0]) if before else 0,
            {parse_lsn(lsn): time for lsn, _, _, time in found if time is not None},
        )

    def is_copying(self, consumer_id: int) -> bool:
        """Return whether a backfill of this mirror is unfinished."""
        return bool(
            self._one(
                "select exists (select from backfills where consumer_id = %s and finished_at is null)", consumer_id
            )
        )

    def log_end(self) -> int:
        """Return the last seq that was drawn."""
        return int(self._one("select coalesce(pg_sequence_last_value('messages_seq'), 0)"))

    def holds(self, seq: int, lsn: int) -> bool:
        """Return whether the log's message `seq` has this commit LSN. A message that retention dropped counts as so."""
        return bool(
            self._one(
                "select coalesce((select commit_lsn = %s::pg_lsn from messages where seq = %s), %s < log_begin())",
                format_lsn(lsn), seq, seq,
            )
        )  # fmt: skip

    def log_begin(self) -> int:
        """Return the first seq that the log can still have."""
        return int(self._one("select log_begin()"))

    def go_back(self, consumer_id: int, seq: int) -> None:
        """Put the offset back to `seq`, so that retention and `lag` know that the rest is applied again."""
        with store_errors():
            self.connection.execute("select return_mirror(%s, %s)", (consumer_id, seq))

    def stop_at_hole(self, consumer_id: int, reason: str, hint: str) -> None:
        """Stop the mirror, and forget how much the target once had. So `mirror resume` accepts that it has less."""
        with store_errors():
            self.connection.execute(
                "update mirrors set target_seq = null, stopped = %s, hint = %s, stopped_at = now()"
                " where consumer_id = %s",
                (reason, hint, consumer_id),
            )

    def last_common(self, lsn: int) -> int:
        """Return the last seq that a target has which applied everything up to `lsn`, before the source lost its tail.

        If the source was promoted, the target's changes after the branch are not in the new history.
        """
        return int(
            self._one(
                "select coalesce(seq_of_lsn(least(%s::pg_lsn, (select t.branch_lsn from timelines t"
                " order by t.from_seq desc limit 1))) - 1, pg_sequence_last_value('messages_seq'), 0)",
                format_lsn(lsn),
            )
        )

    def _one(self, query: str, *arguments: Any) -> Any:
        with store_errors():
            row = self.connection.execute(query.encode(), arguments or None, prepare=True).fetchone()
        return row[0] if row else None

    # notes about the mirror

    def move(
        self,
        consumer_id: int,
        seq: int,
        *,
        target_seq: int | None = None,
        transactions: int = 0,
        changes: int = 0,
        conflicts: int = 0,
        commit_time: datetime | None = None,
    ) -> None:
        """Note that everything up to `seq` is applied, and what was applied since the last call."""
        with store_errors():
            self.connection.execute(
                "select move_mirror(%s, %s, %s, %s, %s, %s, %s)",
                (consumer_id, seq, target_seq, transactions, changes, conflicts, commit_time),
                prepare=True,
            )

    def be_strict(self, consumer_id: int, seq: int | None) -> None:
        """Note that no backfill brings rows after `seq`. None: one does so at present."""
        with store_errors():
            self.connection.execute("update mirrors set strict_from = %s where consumer_id = %s", (seq, consumer_id))

    def stop(self, consumer_id: int, reason: str, hint: str | None) -> None:
        """Note that the mirror has stopped until `mirror resume`."""
        with store_errors():
            self.connection.execute(
                "update mirrors set stopped = %s, hint = %s, stopped_at = now() where consumer_id = %s",
                (reason, hint, consumer_id),
            )

    def fails(self, consumer_id: int, error: str) -> None:
        """Note an error that is tried again."""
        with store_errors():
            self.connection.execute(
                "update mirrors set error = %s, error_at = now() where consumer_id = %s", (error, consumer_id)
            )

    def note_held(self, consumer_id: int, held: int) -> None:
        """Note how many conflicts in the target wait for a decision."""
        with store_errors():
            self.connection.execute("update mirrors set held = %s where consumer_id = %s", (held, consumer_id))

    def be_present(self, consumer_id: int) -> None:
        """Show as long as this session lasts that a process applies the mirror."""
        with store_errors():
            self.connection.execute("select pg_advisory_lock_shared(mirror_lock(%s))", (consumer_id,))

    def note(self, consumer_id: int, text: str) -> None:
        """Note a finding that a person has to know."""
        with store_errors():
            self.connection.execute(
                "update mirrors set note = %s, note_at = now() where consumer_id = %s", (text, consumer_id)
            )

    def listen(self) -> None:
        """Subscribe to the notification that messages have arrived."""
        with store_errors():
            self.connection.execute("select pg_catalog.set_config('cdcbridge.listening', 'on', false)")
            row = self.connection.execute("select store_schema()").fetchone()
            name = row[0] if row else "cdcbridge"
            self.connection.execute(f'listen "{name}"'.encode())

    def wait(self, seconds: float) -> None:
        """Wait until messages arrive for any consumer, or for so many seconds."""
        with store_errors():
            for _ in self.connection.notifies(timeout=seconds, stop_after=1):
                pass
