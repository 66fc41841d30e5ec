"""Write the store on behalf of the bridge: begin an epoch, append to the log, and keep the bridge's state.

An append writes log rows, fan-out, dead letters and position in one transaction, under the fence of the leader's epoch.
This module never confirms an LSN to the source, and never decides which consumer gets a message.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import psycopg
import structlog
from psycopg.types.json import Jsonb

from cdcbridge.config import Config
from cdcbridge.database import BRIDGE_SESSION, Connection, connect_store, cut_off, store_errors
from cdcbridge.errors import Fenced, StoreUnavailable
from cdcbridge.instants import reach
from cdcbridge.lsn import format_lsn, parse_lsn
from cdcbridge.routing.batch import AppendBatch
from cdcbridge.routing.copy_format import (
    COPY_HEADER,
    COPY_MESSAGES,
    COPY_SPILLED,
    COPY_TRAILER,
    COPY_WAITING,
    message_rows,
)
from cdcbridge.routing.fan_out import barrier_rows, waiting_rows
from cdcbridge.store.facts import History, StoreFacts, look_at_store
from cdcbridge.store.feeds import Fault, Feeds, describe
from cdcbridge.store.marks import mark_transactions
from cdcbridge.store.migrate import migrate
from cdcbridge.store.replay import keep_own

# Seconds until TCP gives up on data that the server does not take (tcp(7), TCP_USER_TIMEOUT). A server that waits for a
# lock or for its disk takes no data of an append, so this is long. A server that is out of reach is detected by the
# lead's session, which sends next to nothing and has a short timeout.
_PATIENCE: Final = 60
_SEGMENT: Final = 1_000_000  # seqs in a segment, the same number as in create_segments()
log = structlog.get_logger()


@contextlib.contextmanager
def _segment_missing(seq: int) -> Iterator[None]:
    """Raise StoreUnavailable for a row whose segment does not exist yet.

    Another try succeeds after the transaction that makes the segment has ended.
    """
    try:
        yield
    except psycopg.errors.CheckViolation as error:
        if error.diag.constraint_name is not None:  # a constraint that a user has added: another try does not help
            raise
        raise StoreUnavailable(
            f"the log's segment of seq {seq} does not exist yet: an open transaction that published is creating it",
            hint="`cdcbridge lag` names the transactions that block it.",
        ) from error


def log_end(connection: Connection) -> int:
    """Return the LSN up to which the log has every change that a consumer takes, or 0 before the first start."""
    with store_errors():
        row = connection.execute("select end_lsn::text from positions order by id desc limit 1").fetchone()
    return parse_lsn(row[0]) if row else 0


def _holder() -> str:
    """Return a name of this bridge for people: its host and process."""
    return f"{socket.gethostname()} pid {os.getpid()}"


class BridgeStore:
    """A session of the bridge on the store. Methods raise StoreUnavailable if the session is lost."""

    def __init__(self, dsn: str, schema: str) -> None:
        self._schema = schema
        self._connection = connect_store(
            dsn, schema, "cdcbridge bridge", BRIDGE_SESSION, tcp_user_timeout=_PATIENCE * 1000
        )
        self._epoch = 0
        self._next_segment = 0
        self._next_try = 0.0

    @property
    def connection(self) -> Connection:
        return self._connection

    def close(self) -> None:
        self._connection.close()

    def cut_off(self) -> None:
        """Make an append that is under way in another thread fail at once."""
        cut_off(self._connection)

    def migrate(self) -> None:
        """Migrate the schema to this version.

        Raises:
            OperatorNeeded: The schema is newer than this program.
        """
        migrate(self._connection, self._schema)

    # leadership

    def leader(self) -> str:
        """Return the name of the leader, and since when it leads, for people."""
        with store_errors():
            row = self._connection.execute(
                "select holder || ' since ' || date_trunc('second', started_at) from leaders"
                " order by epoch desc limit 1"
            ).fetchone()
            return row[0] if row else "a bridge that is starting"

    def begin_epoch(self) -> int:
        """Begin a new epoch, and return it.

        From now on no older bridge can append, even one that hangs. Call this while holding the lead (leadership.Lead).
        """
        with store_errors():
            row = self._connection.execute("select take_lead(%s)", (_holder(),)).fetchone()
            self._epoch = row[0] if row else 0
            return self._epoch

    def note_error(self, message: str, hint: str | None) -> None:
        """Store the bridge's last error, for `cdcbridge status`.

        If the store cannot be reached, nothing is stored and nothing is raised.
        """
        holder = f"{socket.gethostname()} pid {os.getpid()}"
        with contextlib.suppress(psycopg.Error):
            self._connection.execute(
                "insert into last_error (message, hint, holder) values (%s, %s, %s) on conflict (only_row) do update"
                " set message = excluded.message, hint = excluded.hint, holder = excluded.holder, at = excluded.at",
                (message, hint, holder),
            )

    # history and position

    def keep_identities(self, given: list[tuple[int, str]]) -> None:
        """Store the tables of the source to which the event trigger gave REPLICA IDENTITY FULL."""
        with store_errors(), self._connection.cursor() as cursor:
            cursor.executemany("insert into given_identities values (%s, %s) on conflict do nothing", given)

    def facts(self) -> StoreFacts:
        """Return the source that feeds this store, and the end of the log."""
        return look_at_store(self._connection)

    def begin_history(self, history: History, lsn: int) -> None:
        """Store, at the first start, which source the changes are from, and the LSN at which they begin."""
        with store_errors(), self._connection.transaction():
            self._connection.execute(
                "insert into source (system_identifier, timeline, database, slot, plugin, database_oid)"
                " values (%s, %s, %s, %s, %s, %s)",
                (
                    history.system_identifier,
                    history.timeline,
                    history.database,
                    history.slot,
                    history.plugin,
                    history.database_oid,
                ),
            )
            self._connection.execute("insert into timelines (from_seq, timeline) values (0, %s)", (history.timeline,))
            self._finish(self._connection, AppendBatch(end_lsn=lsn), None, None)

    def set_timeline(self, timeline: int, branch: int | None) -> None:
        """Store the timeline of a source that was promoted, and the LSN at which it left the one before.

        All changes in the log are part of the new timeline's history, too.
        """
        left = None if branch is None else format_lsn(branch)
        with store_errors(), self._connection.transaction():
            self._connection.execute("update source set timeline = %s, recorded_at = now()", (timeline,))
            self._connection.execute(
                "insert into timelines select coalesce(pg_sequence_last_value('messages_seq'), 0) + 1, %s, %s::pg_lsn"
                " on conflict (from_seq) do update set timeline = excluded.timeline, branch_lsn = excluded.branch_lsn",
                (timeline, left),
            )

    def set_database(self, name: str, oid: int) -> None:
        """Store the present name and OID of the source's database."""
        with store_errors():
            self._connection.execute("update source set database = %s, database_oid = %s", (name, oid))

    def set_capture(self, capture: dict[str, Any]) -> None:
        """Store the publications and tables with which a session begins, in the form of Capture.dump()."""
        with store_errors():
            self._connection.execute("update source set capture = %s", (Jsonb(capture),))

    def set_catalog(self, catalog: dict[str, Any]) -> None:
        """Store the captured tables as they are before a session streams."""
        with store_errors():
            self._connection.execute("update source set catalog = %s", (Jsonb(catalog),))

    def set_feeds(self, config: Config, faults: Iterable[Fault], unfed: Mapping[str, str]) -> Feeds:
        """Store the leader's notes on each consumer, under the fence of this epoch, and return them.

        See Feeds about `unfed`.
        """
        reach("about to note feeds")
        with store_errors(), self._connection.transaction():
            self._begin(self._connection, 0)
            stored = [name for (name,) in self._connection.execute("select name from consumers").fetchall()]
            in_file = [consumer.name for consumer in config.consumers]
            made = describe(self._epoch, _holder(), str(config.path.absolute()), stored, in_file, faults, unfed)
            self._connection.execute("update source set feeds = %s", (Jsonb(made.dump()),))
            return made

    def set_max_retention(self, seconds: float) -> None:
        """Limit visibility timeouts, delays and deliver_at from now on to this number of seconds."""
        with store_errors():
            self._connection.execute("select set_max_retention(make_interval(secs => %s))", (seconds,))

    def set_partitions(self, partitions: int) -> None:
        """Set the number of the log's partitions over which keys are spread, from the next message on."""
        with store_errors():
            changed = self._connection.execute("select begin_partitions(%s)", (partitions,)).fetchone()
            if changed and changed[0]:
                self._connection.execute("select finish_partitions(%s)", (partitions,))

    def partitions(self) -> int:
        """Return the log's present number of partitions.

        While a transaction is unfinished, that can differ from the configuration.
        """
        with store_errors():
            row = self._connection.execute("select log_partitions()").fetchone()
            return row[0] if row else 1

    def catalog(self) -> dict[str, Any]:
        """Return the captured tables of the source, with their partitions, as last stored."""
        with store_errors():
            row = self._connection.execute("select catalog from source").fetchone()
            return row[0] if row else {}

    # append

    def append(
        self, batch: AppendBatch, unfinished: dict[str, Any] | None, catalog: dict[str, Any] | None = None
    ) -> None:
        """Commit a batch: rows, fan-out, dead letters and position, all or nothing.

        Args:
            batch: The rows, their fan-out and the position.
            unfinished: The options with which an open transaction has to be finished.
            catalog: The captured tables to store, if they changed.

        Raises:
            Fenced: A newer epoch leads. Nothing was written.
        """
        connection = self._connection
        with store_errors(), connection.transaction():
            first = self._begin(connection, len(batch.rows))
            reach("append begun")
            if batch.rows:
                with _segment_missing(first):
                    self._write(connection, batch, first)
                reach("rows copied")
            if batch.spilled or batch.unspilled:
                self._spill(connection, batch)
            woken = {consumer for group in batch.groups for consumer in group} | batch.keyed.keys() | batch.streams
            woken |= {consumer for consumer, *_ in batch.later}
            names = ",".join(map(str, sorted(woken))) or None
            if batch.gap:
                # Changes in the gap were never sent, so backfills must not skip the rows that they changed.
                connection.execute("select forget_beginnings('{}')")
                connection.execute("delete from gaps where at < now() - interval '30 days'")
            for record, told in batch.gaps:
                connection.execute("insert into gaps (record, consumers) values (%s, %s)", (Jsonb(record), told))
            if batch.capture is not None:
                connection.execute("update source set capture = %s", (Jsonb(batch.capture),))
            if batch.marks:
                mark_transactions(connection, batch.marks.values())
            if batch.fed_again is not None:
                place = ["unfed", str(batch.fed_again)]
                connection.execute("update source set feeds = feeds #- %s", (place,))
            if catalog is not None:
                connection.execute("update source set catalog = %s, recorded_at = now()", (Jsonb(catalog),))
            for chunk, sent in batch.chunks:
                connection.execute(
                    "select put_progress(%s, %s, %s, %s, %s, %s)",
                    (
                        chunk.backfill_id,
                        Jsonb(chunk.place),
                        chunk.looked_at,
                        sent,
                        chunk.last,
                        None if chunk.early is None else Jsonb(chunk.early),
                    ),
                    prepare=True,
                )
            self._finish(connection, batch, unfinished if batch.open else None, names)
            reach("position written")
        reach("committed")
        with store_errors():
            self._make_segments(first + len(batch.rows))

    def _begin(self, connection: Connection, rows: int) -> int:
        try:
            row = connection.execute("select begin_append(%s, %s)", (self._epoch, rows), prepare=True).fetchone()
        except psycopg.Error as error:
            if error.sqlstate == "CB010":
                raise Fenced(str(error.diag.message_primary)) from error
            raise
        return row[0] if row else 0

    def _write(self, connection: Connection, batch: AppendBatch, first: int) -> None:
        with connection.cursor() as cursor:
            with cursor.copy(COPY_MESSAGES) as copy:
                copy.write(
                    COPY_HEADER
                    + message_rows(batch.rows, first, batch.partitions if batch.streams else ())
                    + COPY_TRAILER
                )
            if batch.groups or batch.keyed:
                with cursor.copy(COPY_WAITING) as copy:
                    copy.write(COPY_HEADER + waiting_rows(batch, first) + COPY_TRAILER)
            if barriers := barrier_rows(batch, first):
                cursor.execute("select insert_barriers(%s, %s)", tuple(map(list, zip(*barriers, strict=True))))
            if batch.later:
                consumers, indexes, keys, times = zip(*batch.later, strict=True)
                seqs = [first + index for index in indexes]
                query = "select delay_appended(%s, %s, %s, %s::timestamptz[])"
                cursor.execute(query, (list(consumers), seqs, list(keys), list(times)))
            keep_own(connection, batch.own, first)
            if batch.dead:
                consumers, indexes, reasons, keys = zip(*batch.dead, strict=True)
                seqs = [first + index for index in indexes]
                query = "select bury_appended(%s, %s, %s, %s)"
                cursor.execute(query, (list(consumers), seqs, list(reasons), list(keys)))

    def _spill(self, connection: Connection, batch: AppendBatch) -> None:
        """Store blocks of transactions in progress, and delete those that are not needed any more."""
        with connection.cursor() as cursor, cursor.copy(COPY_SPILLED) as copy:
            copy.set_types(["int8", "int4", "bytea"])
            for row in batch.spilled:
                copy.write_row(row)
        connection.execute("delete from spilled where xid = any (%s)", (batch.unspilled,))

    def _finish(
        self, connection: Connection, batch: AppendBatch, unfinished: dict[str, Any] | None, woken: str | None
    ) -> None:
        connection.execute(
            "select finish_append(%s::pg_lsn, %s, %s::pg_lsn, %s, %s, %s, %s)",
            (
                format_lsn(batch.position.commit_lsn),
                batch.position.ordinal,
                format_lsn(batch.end_lsn),
                None if unfinished is None else Jsonb(unfinished),
                batch.commit_time,
                woken,
                batch.effective_time,
            ),
            prepare=True,
        )

    def _make_segments(self, seq: int) -> None:
        """Keep a whole empty segment after the log's end.

        The server is asked once per segment, and again a second later if a lock was not free.
        """
        if seq < self._next_segment or time.monotonic() < self._next_try:
            return
        try:
            self._connection.execute("select create_segments()")
        except psycopg.errors.LockNotAvailable as error:
            self._next_try = time.monotonic() + 1
            log.warning("segment.waits", seq=seq, reason=str(error.diag.message_primary))
            return
        self._next_segment = (seq // _SEGMENT + 1) * _SEGMENT

    def forget_spilled(self) -> None:
        """Delete the blocks that an earlier session stored, because the source sends those transactions again.

        This runs under the fence of the epoch.
        """
        with store_errors(), self._connection.transaction():
            self._begin(self._connection, 0)
            self._connection.execute("delete from spilled")  # TRUNCATE would wait for a session that dumps the store

    def bury_expired(self) -> int:
        """Make dead letters of the messages whose last delivery expired, and return their number."""
        with store_errors():
            row = self._connection.execute("select bury_expired()").fetchone()
            return row[0] if row else 0
