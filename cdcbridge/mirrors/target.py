"""A mirror's session on its target: its replication origin, its place, and its transactions.

The place is a row that is committed together with the changes, so a change is applied exactly once, whatever is killed.
The replication origin marks the rows as written by this mirror, and gives them the commit time of the source. A second
applier of the same mirror is refused by an advisory lock. Never decides which changes to apply.

Source: PostgreSQL manual, "Replication Progress Tracking".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.abc import Buffer
from psycopg.adapt import Dumper

from cdcbridge.config import Mirror
from cdcbridge.database import connect_target, target_errors
from cdcbridge.errors import OperatorNeeded, TargetUnavailable
from cdcbridge.lsn import format_lsn, parse_lsn
from cdcbridge.routing.mirror_marks import MARKER_PREFIX, Marker, source_identity

_JSON_OID: Final = 114
_LOCK_TIMEOUT: Final = "500ms"
ORIGIN_FUNCTIONS: Final = (
    "pg_replication_origin_create(text)",
    "pg_replication_origin_oid(text)",
    "pg_replication_origin_session_setup(text)",
    "pg_replication_origin_session_is_setup()",
    "pg_replication_origin_xact_setup(pg_lsn, timestamptz)",
    "pg_replication_origin_drop(text)",
)


# A place that is not after the present one violates the not-null constraint. So nothing is ever applied twice.
_PUT_PLACE: Final = """
    with put as (
        insert into mirror_places (mirror, source, seq, commit_lsn)
        select %s, %s,
               case when not exists (select from mirror_places p
                                     where p.seq >= %s and p.mirror = %s and p.source = %s) then %s::bigint end,
               %s::pg_lsn
        returning id)
    delete from mirror_places p using put where p.mirror = %s and p.source = %s and p.id < put.id
"""


class RowsJson(bytes):
    """JSON text that is sent to the server as it is."""


class _RowsDumper(Dumper):
    oid = _JSON_OID

    def dump(self, obj: Any) -> Buffer:
        return bytes(obj)


@dataclass(slots=True, frozen=True)
class Place:
    """The place up to which the target has all changes: a seq of the source's log, and its commit LSN."""

    seq: int
    lsn: int


def rights_needed(role: str) -> list[str]:
    """Return the statements by which a superuser lets a plain role use replication origins."""
    grants = [f"grant execute on function {name} to {role};" for name in ORIGIN_FUNCTIONS]
    return [*grants, f"grant set on parameter session_replication_role to {role};"]


def origin_name(mirror: str, source: str) -> str:
    """Return the name of the replication origin, for example `cdcbridge:to_b:7412345678901234567/16384`."""
    return f"cdcbridge:{mirror}:{source}"


class TargetSession:
    """The session, with at most one transaction open.

    Args:
        mirror: The settings.
        source: The identity of the source.
    """

    def __init__(self, mirror: Mirror, source: str) -> None:
        self._mirror = mirror
        self._source = source
        self.connection = connect_target(mirror.target.dsn.get_secret_value(), mirror.target.schema_)
        self.connection.adapters.register_dumper(RowsJson, _RowsDumper)
        self.origin: int | None = None
        self.open = False
        self.marked = 0  # the LSN in the marker of the last transaction

    def close(self) -> None:
        self.connection.close()

    # the beginning

    def prepare(self) -> None:
        """Take the lock of this mirror, make the mirror's tables, and set up its origin.

        Raises:
            TargetUnavailable: Another process applies this mirror at present.
            OperatorNeeded: A right is missing that the settings need.
        """
        with target_errors():
            self._take_lock()
            self._make_tables()
            self._set_up_origin()
            # A transaction of the target that waits for one of ours must not become the victim of a deadlock. The
            # server looks for deadlocks after a second.
            self.connection.execute(f"set lock_timeout = '{_LOCK_TIMEOUT}'".encode())
            if self._mirror.triggers == "replica":
                self._silence_triggers()

    def _take_lock(self) -> None:
        name = origin_name(self._mirror.name, self._source)
        row = self.connection.execute("select pg_try_advisory_lock(hashtextextended(%s, 0))", (name,)).fetchone()
        if row is None or not row[0]:
            raise TargetUnavailable(f"another process applies the mirror {self._mirror.name!r} to this target")

    def _make_tables(self) -> None:
        schema = self._mirror.target.schema_
        if self._found("select to_regclass(%s)", f'"{schema}".mirror_places') is not None:
            return
        script = (resources.files("cdcbridge") / "sql" / "target" / "mirror.sql").read_text()
        with self.connection.transaction():
            # Another mirror may begin on the same target at this moment, and would create the same tables.
            self.connection.execute("select pg_advisory_xact_lock(hashtextextended('cdcbridge mirror tables', 0))")
            if self._found("select to_regnamespace(%s)", f'"{schema}"') is None:
                self.connection.execute(sql.SQL("create schema {}").format(sql.Identifier(schema)))
            self.connection.execute(script.encode())

    def _set_up_origin(self) -> None:
        """Let the session write under the mirror's replication origin, if the role may do so."""
        name = origin_name(self._mirror.name, self._source)
        try:
            if self._found("select pg_replication_origin_oid(%s)", name) is None:
                self.connection.execute("select pg_replication_origin_create(%s)", (name,))
            self.connection.execute("select pg_replication_origin_session_setup(%s)", (name,))
            self.origin = self._found("select pg_replication_origin_oid(%s)", name)
            self.connection.execute("select set_config('cdcbridge.origin', %s, false)", (str(self.origin),))
        except psycopg.errors.InsufficientPrivilege as error:
            if self._mirror.two_way is not None:
                raise self._missing_right("replication origins", error) from error
        except psycopg.errors.ObjectInUse as error:
            raise TargetUnavailable(f"target: the replication origin {name} is in use by another session") from error

    def _silence_triggers(self) -> None:
        try:
            self.connection.execute("set session_replication_role = replica")
        except psycopg.errors.InsufficientPrivilege as error:
            raise self._missing_right("triggers: replica", error) from error

    def _missing_right(self, what: str, error: psycopg.Error) -> OperatorNeeded:
        role = str(self._found("select quote_ident(current_user)"))
        return OperatorNeeded(
            f"target: the role {role} lacks a right that {what} needs: {error.diag.message_primary}",
            hint=f"As a superuser of the target: {' '.join(rights_needed(role))}",
        )

    def _found(self, query: str, *arguments: Any) -> Any:
        row = self.connection.execute(query.encode(), arguments or None).fetchone()
        return row[0] if row else None

    # its identity and place

    def identity(self) -> str:
        """Return the identity of the target's database."""
        with target_errors():
            row = self.connection.execute(
                "select (select system_identifier::text from pg_control_system()),"
                " (select oid::bigint from pg_database where datname = current_database())"
            ).fetchone()
        return source_identity(*row) if row else ""

    def place(self) -> Place | None:
        """Return the place that the target has, or None before the first transaction of this mirror."""
        with target_errors():
            row = self.connection.execute(
                "select seq, commit_lsn::text from mirror_places where mirror = %s and source = %s"
                " order by id desc limit 1",
                (self._mirror.name, self._source),
            ).fetchone()
        return Place(row[0], parse_lsn(row[1])) if row else None

    def go_back(self, place: Place) -> None:
        """Put the place back, because the source has lost what the target has after it."""
        names = (self._mirror.name, self._source)
        with target_errors(), self.connection.transaction():
            self.connection.execute("delete from mirror_places where mirror = %s and source = %s", names)
            self.connection.execute(
                "insert into mirror_places (mirror, source, seq, commit_lsn) values (%s, %s, %s, %s::pg_lsn)",
                (*names, place.seq, format_lsn(place.lsn)),
            )

    # transactions

    def begin(self, lsn: int) -> None:
        """Begin a transaction that applies the source's changes up to the commit LSN `lsn`."""
        with target_errors(), self.connection.pipeline():
            self.connection.execute("begin")
            self.open = True
            self.marked = lsn
            self.connection.execute(
                "select pg_logical_emit_message(true, %s, %s)",
                (MARKER_PREFIX, Marker(self._source, lsn, self._mirror.name).dump()),
                prepare=True,
            )

    def commit(self, place: Place | None, lsn: int, commit_time: datetime | None) -> None:
        """Store the place, and commit.

        Args:
            place: The place up to which the transaction has all changes. None: the place stays.
            lsn: The commit LSN of the last of these changes.
            commit_time: When the source committed it. None: not known.
        """
        names = (self._mirror.name, self._source)
        with target_errors():
            with self.connection.pipeline():
                if place is not None:
                    self.connection.execute(
                        _PUT_PLACE,
                        (*names, place.seq, *names, place.seq, format_lsn(place.lsn), *names),
                        prepare=True,
                    )
                if self.origin is not None and lsn:
                    self.connection.execute(
                        "select pg_replication_origin_xact_setup(%s::pg_lsn, coalesce(%s, now()))",
                        (format_lsn(lsn), commit_time),
                        prepare=True,
                    )
                self.connection.execute("commit")
            self.open = False

    def roll_back(self) -> None:
        """Undo the open transaction, if there is one."""
        if self.open and not self.connection.closed:
            self.open = False
            with target_errors():
                self.connection.execute("rollback")

    def run(self, statement: sql.Composed, rows: Sequence[Iterable[str]]) -> int:
        """Run a statement of tables.py, and return the number of rows that it wrote.

        Args:
            statement: The statement.
            rows: For each of its parameters, the JSON texts of the rows.
        """
        parameters = [_array(texts) for texts in rows]
        return self.connection.execute(statement, parameters, prepare=True).rowcount

    def fetch(self, statement: sql.Composed, rows: Iterable[str]) -> list[tuple[Any, ...]]:
        """Run a statement of tables.py that returns rows."""
        return self.connection.execute(statement, [_array(rows)], prepare=True).fetchall()


def _array(texts: Iterable[str]) -> RowsJson:
    return RowsJson(f"[{','.join(texts)}]".encode())
