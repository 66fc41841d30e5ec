"""Read a replication slot with the streaming replication protocol, over psycopg's libpq layer.

This module hands out payloads unchanged, and never confirms any LSN but the one that its caller gives.

Source: PostgreSQL manual, "Streaming Replication Protocol" and "Logical Streaming Replication Parameters", and
psycopg's documentation of `psycopg.pq`.
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
_HEADER: Final = 25  # bytes before the payload of XLogData: type, start, end, clock
_READ_AHEAD: Final = 500_000
_UNKNOWN_OPTION: Final = "22023"  # invalid_parameter_value: wal2json does not know an option
_UNDEFINED_OBJECT: Final = "42704"
_UNITS: Final = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
SENDER_TIMEOUT: Final = 3.0

SESSION: Final = {"client_min_messages": "warning"}  # wal2json's warnings arrive, and no notices


class UnknownOption(Exception):
    """The error of a plugin that does not know one of the options. The session can start again without that option."""


class ReplicationStream:
    """One replication session.

    Its methods raise SourceUnavailable when the session breaks, and OperatorNeeded when the slot is unusable.
    """

    def __init__(self, dsn: str, *, patient: bool = False) -> None:
        """Open the session.

        Args:
            dsn: The connection string of the source.
            patient: Whether to keep the server's wal_sender_timeout, the time for which it waits for signs of life.
                Otherwise it waits for SENDER_TIMEOUT seconds at most.
        """
        text = conninfo(dsn, "cdcbridge replication", SESSION, replication="database")
        self._pgconn = pq.PGconn.connect(text.encode())
        if self._pgconn.status != pq.ConnStatus.OK:
            if session.REFUSED_BY_POOLER in self._error():
                raise behind_pooler("source", self._error())
            raise SourceUnavailable(f"source: {self._error()}")
        self._pin()
        # libpq's buffer grows to the size of the largest message that it ever held, and never shrinks. This
        # statement returns one long row, so that each later read takes hundreds of messages instead of a few.
        self._pgconn.exec_(b"select repeat(' ', %d)" % _READ_AHEAD)
        self.patient = patient
        self.sender_timeout = self._sender_timeout(None if patient else SENDER_TIMEOUT)
        self._pgconn.notice_handler = lambda result: self.on_notice(_notice(result))
        self.on_notice: Callable[[str], None] = lambda _message: None  # called at the notice's place in the stream
        self.wal_end = 0
        self.reply_wanted = False
        self.drained = False
        self._last: bytes | memoryview = bytes(_HEADER)

    def _pin(self) -> None:
        """Set the parameters that affect the plugin's output, even if libpq's environment contains other values."""
        pid = int(self.query(session.pin(SESSION, self.pid).as_bytes(None))[0])
        if pid != self.pid:
            raise behind_pooler("source", f"the server process is {pid}, and the pooler calls it {self.pid}")

    def fileno(self) -> int:
        return self._pgconn.socket

    def close(self) -> None:
        """End the session, so that the server frees the slot at once."""
        self._pgconn.finish()

    def _sender_timeout(self, longest: float | None) -> float:
        """Return wal_sender_timeout in seconds, or 0 if it is off, after shortening it to `longest` seconds.

        With a short timeout, the slot of a bridge that hangs or was cut off is soon free for the next bridge.
        """
        value = self.query(b"SHOW wal_sender_timeout")[0]
        number = value.rstrip("abcdefghijklmnopqrstuvwxyz")
        seconds = float(number) * _UNITS.get(value[len(number) :], 0.001)
        if longest is not None and (seconds <= 0 or seconds > longest):
            self._pgconn.exec_(b"SET wal_sender_timeout = '%dms'" % round(longest * 1000))
            return longest
        return seconds

    def identify(self) -> tuple[str, int, int, str]:
        """Return the system identifier, the timeline, the current WAL position and the database."""
        row = self.query(b"IDENTIFY_SYSTEM")
        return row[0], int(row[1]), parse_lsn(row[2]), row[3]

    @property
    def pid(self) -> int:
        return self._pgconn.backend_pid

    def branch(self, old: int, new: int) -> int | None:
        """Return the LSN at which the timeline `new` left `old`, or None if it does not descend from it."""
        if new <= old:
            return None
        _file, content = self.query(b"TIMELINE_HISTORY %d" % new)
        for line in content.splitlines():
            fields = line.split()
            if len(fields) >= 2 and fields[0] == str(old):
                return parse_lsn(fields[1])
        return None

    def create_slot(self, name: str, plugin: str, *, failover: bool) -> tuple[int, str]:
        """Create the slot with an exported snapshot, and return its first position and the name of the snapshot.

        The snapshot is valid until the next command in this session. The option `failover` needs PostgreSQL 17 or
        newer, and a server that is not a standby.

        Source: PostgreSQL manual, "Streaming Replication Protocol" (CREATE_REPLICATION_SLOT).
        """
        given = sql.SQL("SNAPSHOT 'export', FAILOVER true" if failover else "SNAPSHOT 'export'")
        command = sql.SQL("CREATE_REPLICATION_SLOT {} LOGICAL {} ({})")
        row = self.query(command.format(sql.Identifier(name), sql.Identifier(plugin), given).as_bytes(None))
        return parse_lsn(row[1]), row[2]

    def set_failover(self, slot: str, failover: bool) -> None:
        """Set the slot's failover property with ALTER_REPLICATION_SLOT (PostgreSQL 17 and newer).

        Raises:
            SlotInUse: Another session uses the slot.
        """
        command = sql.SQL("ALTER_REPLICATION_SLOT {} (FAILOVER {})")
        result = self._pgconn.exec_(command.format(sql.Identifier(slot), sql.SQL(str(failover).lower())).as_bytes(None))
        if result.status != pq.ExecStatus.COMMAND_OK:
            self._refused(slot, result)

    def query(self, command: bytes) -> list[str]:
        """Return the first row of the result of SHOW or of a replication command, as texts."""
        result = self._pgconn.exec_(command)
        if result.status != pq.ExecStatus.TUPLES_OK:
            raise SourceUnavailable(f"source: {_message(result)}")
        return [(result.get_value(0, column) or b"").decode() for column in range(result.nfields)]

    def start(self, slot: str, lsn: int, options: Mapping[str, str]) -> None:
        """Start to stream from `lsn`, or from the LSN that the slot has confirmed if that is later.

        Raises:
            UnknownOption: The plugin does not know one of the options.
            SlotInUse: Another session streams from the slot.
            OperatorNeeded: The slot is unusable, or the role lacks a right.
        """
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
            raise SlotInUse(
                f"source: {message}", hint="Another session streams from this slot. The bridge waits for it to end."
            )
        if state in ("42704", "55000", "58P01"):
            raise OperatorNeeded(
                f"the replication slot {slot!r} cannot be used: {message}",
                hint="`cdcbridge slot list` shows its state. `cdcbridge slot recreate` continues after a gap message.",
            )
        if state == "42501":
            hint = (result.error_field(pq.DiagnosticField.MESSAGE_HINT) or b"").decode(errors="replace")
            raise OperatorNeeded(f"source: {message}", hint=hint or None)
        raise SourceUnavailable(f"source: {message}")

    def messages(self, size: int) -> Iterator[bytes]:
        """Yield the plugin's messages that have arrived, in order, until their size reaches `size` bytes.

        Afterwards `drained` is true if nothing more can be read at the moment. Keepalive messages are not yielded. They
        set `wal_end`, the server's position in the WAL, and `reply_wanted`, which is true if the server wants a status
        update.
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
                # The last read may have filled libpq's buffer, and the socket may hold more.
                self._read_socket()
                just_read = True

    def _read_socket(self) -> None:
        try:
            self._pgconn.consume_input()
        except Exception as error:
            raise SourceUnavailable(f"source: {self._error() or error}") from error

    def last_lsn(self) -> int:
        """Return the position of the last message in the WAL."""
        return int.from_bytes(self._last[1:9])

    def confirm(self, written: int, durable: int) -> None:
        """Send a status update, after which the server may remove its WAL up to `durable`.

        The update asks for a keepalive in reply, which reports the server's position even when the server has nothing
        to send.

        Args:
            written: The LSN to report as written.
            durable: The LSN to report as flushed and applied. It must never exceed the LSN that the store has.
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
        """End the stream in good order, so that the server accepts the last status update."""
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
            raise OperatorNeeded(f"source: the server cannot decode the next WAL: {message}")
        raise SourceUnavailable(f"source: the stream ended: {message or 'connection closed'}")

    def _error(self) -> str:
        return one_line(self._pgconn.error_message.decode(errors="replace"))


def _message(result: pq.abc.PGresult) -> str:
    return one_line(result.error_message.decode(errors="replace"))


def _state(result: pq.abc.PGresult) -> str:
    return (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()


def _notice(result: pq.abc.PGresult) -> str:
    return (result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"").decode(errors="replace")
