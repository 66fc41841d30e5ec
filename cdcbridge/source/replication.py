"""A walsender's other end: streaming replication over psycopg's libpq layer. Part of the rim.

Source: PostgreSQL manual, "Streaming Replication Protocol" and "Logical Streaming Replication Parameters"; psycopg's
documentation of `psycopg.pq`. Hands out payloads as they are, and confirms exactly what it is told to.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from psycopg import pq, sql

from cdcbridge.changes.position import postgres_now
from cdcbridge.database import behind_pooler, conninfo, one_line, session
from cdcbridge.database.sqlstates import verdict
from cdcbridge.errors import OperatorNeeded, SlotInUse, SourceUnavailable, Unpublished
from cdcbridge.instants import reach
from cdcbridge.lsn import format_lsn, parse_lsn

_KEEPALIVE = struct.Struct("!cQqB")
_STATUS = struct.Struct("!cQQQqB")
_XLOG_DATA: Final = b"w"[0]
_HEADER: Final = 25  # of XLogData: type, start, end, clock
_READ_AHEAD: Final = 500_000
_UNKNOWN_OPTION: Final = "22023"  # invalid_parameter_value, as wal2json calls an option that it does not know
_UNDEFINED_OBJECT: Final = "42704"
_UNITS: Final = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
SENDER_TIMEOUT: Final = 3.0

SESSION: Final = {"client_min_messages": "warning"}  # lets wal2json's warnings through, and nothing else


class UnknownOption(Exception):
    """The plugin does not know one of the options; the session can start again without it."""


class ReplicationStream:
    """One replication session. Raises SourceUnavailable when it breaks, OperatorNeeded when the slot is unusable."""

    def __init__(self, dsn: str, *, patient: bool = False) -> None:
        """`patient`: the server waits for signs of life as long as it is set to; else for SENDER_TIMEOUT at most."""
        text = conninfo(dsn, "cdcbridge replication", SESSION, replication="database")
        self._pgconn = pq.PGconn.connect(text.encode())
        if self._pgconn.status != pq.ConnStatus.OK:
            if session.REFUSED_BY_POOLER in self._error():
                raise behind_pooler("source", self._error())
            raise SourceUnavailable(f"source: {self._error()}")
        self._pin()
        # libpq's buffer grows to the largest message it ever held, and stays: one long row makes it take in hundreds of
        # messages per read instead of a few.
        self._pgconn.exec_(b"select repeat(' ', %d)" % _READ_AHEAD)
        self.patient = patient
        self.sender_timeout = self._sender_timeout(None if patient else SENDER_TIMEOUT)
        self._pgconn.notice_handler = lambda result: self.on_notice(_notice(result))
        self.on_notice: Callable[[str], None] = lambda _message: None  # called where the notice stands in the stream
        self.wal_end = 0
        self.reply_wanted = False
        self.drained = False
        self._last: bytes | memoryview = bytes(_HEADER)

    def _pin(self) -> None:
        """Set what the plugin's output depends on, also where libpq's environment says otherwise."""
        pid = int(self.query(session.pin(SESSION, self.pid).as_bytes(None))[0])
        if pid != self.pid:
            raise behind_pooler("source", f"the server process is {pid}, and the pooler calls it {self.pid}")

    def fileno(self) -> int:
        return self._pgconn.socket

    def close(self) -> None:
        """End the session; the server frees the slot at once."""
        self._pgconn.finish()

    def _sender_timeout(self, longest: float | None) -> float:
        """wal_sender_timeout in seconds, 0 where it is off; shortened to `longest` first.

        So the slot of a bridge that hangs or was cut off is soon free for the next one.
        """
        value = self.query(b"SHOW wal_sender_timeout")[0]
        number = value.rstrip("abcdefghijklmnopqrstuvwxyz")
        seconds = float(number) * _UNITS.get(value[len(number) :], 0.001)
        if longest is not None and (seconds <= 0 or seconds > longest):
            self._pgconn.exec_(b"SET wal_sender_timeout = '%dms'" % round(longest * 1000))
            return longest
        return seconds

    def identify(self) -> tuple[str, int, int, str]:
        """(system identifier, timeline, current WAL position, database)."""
        row = self.query(b"IDENTIFY_SYSTEM")
        return row[0], int(row[1]), parse_lsn(row[2]), row[3]

    @property
    def pid(self) -> int:
        return self._pgconn.backend_pid

    def branch(self, old: int, new: int) -> int | None:
        """Where the timeline `new` left `old`, or None where it does not come from it."""
        if new <= old:
            return None
        _file, content = self.query(b"TIMELINE_HISTORY %d" % new)
        for line in content.splitlines():
            fields = line.split()
            if len(fields) >= 2 and fields[0] == str(old):
                return parse_lsn(fields[1])
        return None

    def create_slot(self, name: str, plugin: str, *, failover: bool) -> tuple[int, str]:
        """Create the slot with an exported snapshot, which is good until the next command here: (first position, its
        name). `failover`: from PostgreSQL 17 on, and not on a standby.
        Source: PostgreSQL manual, "Streaming Replication Protocol" (CREATE_REPLICATION_SLOT).
        """
        given = sql.SQL("SNAPSHOT 'export', FAILOVER true" if failover else "SNAPSHOT 'export'")
        command = sql.SQL("CREATE_REPLICATION_SLOT {} LOGICAL {} ({})")
        row = self.query(command.format(sql.Identifier(name), sql.Identifier(plugin), given).as_bytes(None))
        return parse_lsn(row[1]), row[2]

    def set_failover(self, slot: str, failover: bool) -> None:
        """ALTER_REPLICATION_SLOT (PostgreSQL 17+). Raises SlotInUse while another session has it."""
        command = sql.SQL("ALTER_REPLICATION_SLOT {} (FAILOVER {})")
        result = self._pgconn.exec_(command.format(sql.Identifier(slot), sql.SQL(str(failover).lower())).as_bytes(None))
        if result.status != pq.ExecStatus.COMMAND_OK:
            self._refused(slot, result)

    def query(self, command: bytes) -> list[str]:
        """The first row of a replication command's or SHOW's result, as texts."""
        result = self._pgconn.exec_(command)
        if result.status != pq.ExecStatus.TUPLES_OK:
            raise SourceUnavailable(f"source: {_message(result)}")
        return [(result.get_value(0, column) or b"").decode() for column in range(result.nfields)]

    def start(self, slot: str, lsn: int, options: Mapping[str, str]) -> None:
        """START_REPLICATION from `lsn`, or from what the slot has confirmed if that is later."""
        given = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(name), sql.Literal(value)) for name, value in options.items()
        )
        command = sql.SQL("START_REPLICATION SLOT {} LOGICAL {} ({})").format(
            sql.Identifier(slot),
            sql.SQL(format_lsn(lsn)),
            given,
        )
        result = self._pgconn.exec_(command.as_bytes(None))
        if result.status != pq.ExecStatus.COPY_BOTH:
            if _state(result) == _UNKNOWN_OPTION:
                raise UnknownOption(_message(result))
            self._refused(slot, result)

    def _refused(self, slot: str, result: pq.abc.PGresult) -> None:
        state = _state(result)
        message = _message(result)
        if state == "55006":
            raise SlotInUse(f"source: {message}", hint="Another session streams from this slot; waiting for it.")
        if state in ("42704", "55000", "58P01"):
            raise OperatorNeeded(
                f"the replication slot {slot!r} cannot be used: {message}",
                hint="`cdcbridge slot list` shows its state; `cdcbridge slot recreate` goes on behind a gap message.",
            )
        if state == "42501":
            hint = (result.error_field(pq.DiagnosticField.MESSAGE_HINT) or b"").decode(errors="replace")
            raise OperatorNeeded(f"source: {message}", hint=hint or None)
        raise SourceUnavailable(f"source: {message}")

    def messages(self, size: int) -> Iterator[bytes]:
        """What the plugin sent and has arrived, in order, until so many bytes are reached.

        `drained` tells afterwards whether there is nothing more to read just now. Keepalives are taken out:
        `wal_end` is where the server says it is, `reply_wanted` that it wants a status.
        """
        get = self._pgconn.get_copy_data
        self.drained = False
        just_read = False
        while size > 0:
            length, data = get(1)
            if length > 0:
                just_read = False
                if data[0] == _XLOG_DATA:
                    self._last = data
                    yield bytes(data[_HEADER:])
                    size -= length
                else:
                    self._keepalive(bytes(data))
            elif length < 0:
                self._ended()
            elif just_read:
                self.drained = True
                return
            else:
                # The last read may have filled libpq's buffer; the socket may have more.
                self._read_socket()
                just_read = True

    def _read_socket(self) -> None:
        try:
            self._pgconn.consume_input()
        except Exception as error:
            raise SourceUnavailable(f"source: {self._error() or error}") from error

    def last_lsn(self) -> int:
        """Where in the WAL the last message stands."""
        return int.from_bytes(self._last[1:9])

    def confirm(self, written: int, durable: int) -> None:
        """A status update: `durable` may go from the server's WAL. Never more than what the store has.

        Asks for a keepalive in return, which tells how far the server has come when it has nothing to send.
        """
        reach("about to confirm")
        status = _STATUS.pack(b"r", max(written, durable), durable, durable, postgres_now(), 1)
        try:
            self._pgconn.put_copy_data(status)
            self._pgconn.flush()
        except Exception as error:
            raise SourceUnavailable(f"source: {self._error() or error}") from error
        self.reply_wanted = False
        reach("confirmed")

    def finish(self) -> None:
        """Leave the stream in good order, so that the server takes the last status."""
        self._pgconn.put_copy_end()
        self._pgconn.flush()

    def _keepalive(self, data: bytes) -> None:
        kind, wal_end, _clock, reply = _KEEPALIVE.unpack(data)
        if kind != b"k":
            raise SourceUnavailable(f"source: unknown replication message {kind!r}")
        self.wal_end = wal_end
        self.reply_wanted = self.reply_wanted or bool(reply)

    def _ended(self) -> None:
        result = self._pgconn.get_result()
        message = _message(result) if result is not None else self._error()
        state = _state(result) if result is not None else ""
        if state == _UNDEFINED_OBJECT:
            # Only pgoutput looks objects up by name while it decodes, and only its publications.
            raise Unpublished(f"source: {message}")
        if state and verdict(state) != "away":
            raise OperatorNeeded(f"source: the server cannot decode what comes next: {message}")
        raise SourceUnavailable(f"source: the stream ended: {message or 'connection closed'}")

    def _error(self) -> str:
        return one_line(self._pgconn.error_message.decode(errors="replace"))


def _message(result: pq.abc.PGresult) -> str:
    return one_line(result.error_message.decode(errors="replace"))


def _state(result: pq.abc.PGresult) -> str:
    return (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()


def _notice(result: pq.abc.PGresult) -> str:
    return (result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"").decode(errors="replace")
