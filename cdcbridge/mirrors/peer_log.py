"""Look up the writes of the target itself, in the log that the target's own bridge keeps.

Before the look-up, the log must have everything that the target committed. The mirror therefore writes a small message
into the target's WAL, and waits until the log has passed it. Never changes the target's store.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from cdcbridge.config import Mirror
from cdcbridge.database import Connection, connect_store, store_errors, target_errors
from cdcbridge.errors import OperatorNeeded, TargetUnavailable
from cdcbridge.lsn import format_lsn, parse_lsn
from cdcbridge.mirrors.rule import Write
from cdcbridge.mirrors.tables import TargetTable
from cdcbridge.routing.mirror_marks import PROBE_PREFIX, source_identity
from cdcbridge.routing.patterns import is_name, take

PATIENCE: Final = 2.0  # seconds; meanwhile the mirror's transaction keeps locks on rows of the target
_OPPOSITE: Final = {"prefer_source": "prefer_target", "prefer_target": "prefer_source"}
_PAUSE: Final = 0.002  # seconds between two looks at the log's end


def _words(conflict: Any) -> str:
    """Return a value of `conflict` as it is written in YAML."""
    if not isinstance(conflict, dict):
        return str(conflict)
    return f"{{{', '.join(f'{pattern}: {rule}' for pattern, rule in conflict.items())}}}"


@dataclass(slots=True, frozen=True)
class OwnWrite:
    """The last write of a key in the target itself.

    Attributes:
        write: The write.
        ordinal: Its place in its transaction.
        record: The row after the write, as JSON text. None for a delete.
    """

    write: Write
    ordinal: int
    record: str | None

    @property
    def position(self) -> str:
        """The position of the write, for example `16/B374D848#3`."""
        return f"{format_lsn(self.write.lsn)}#{self.ordinal}"


class BehindPeer(TargetUnavailable):
    """The target's own bridge has not read the newest changes of the target within the time limit."""


class PeerLog:
    """A session on the store of the target.

    Args:
        mirror: The settings, with `two_way`.
        source: The identity of the source.
    """

    def __init__(self, mirror: Mirror, source: str) -> None:
        given = mirror.target.store_dsn or mirror.target.dsn
        self._mirror = mirror
        self._source = source
        self._tables: list[str] = []  # the patterns of the peer
        with target_errors():
            self.connection = connect_store(given.get_secret_value(), mirror.target.schema_, "cdcbridge mirror")

    def close(self) -> None:
        self.connection.close()

    def require_peer(self, target: str) -> None:
        """Check that the target's store is that of the target, and has the peer with fitting rules.

        Args:
            target: The identity of the target.

        Raises:
            TargetUnavailable: The target's bridge has not begun yet, or does not know the peer yet.
            OperatorNeeded: The peer's settings do not fit.
        """
        peer = self._mirror.two_way.peer if self._mirror.two_way else ""
        with store_errors():
            known = self.connection.execute("select to_regclass('transaction_marks')").fetchone()
            if known is None or known[0] is None:
                raise TargetUnavailable(
                    "target: two_way needs the target's own bridge, which has not run yet",
                    hint=f"Run `cdcbridge run` beside the target, with a mirror named {peer!r} in its file.",
                )
            source = self.connection.execute("select system_identifier, database_oid from source").fetchone()
            row = self.connection.execute(
                "select config -> 'mirror' -> 'conflict', config -> 'mirror' ->> 'unique',"
                " config -> 'mirror' -> 'two_way' ->> 'peer', config -> 'tables'"
                " from consumers where name = %s and config ? 'mirror'",
                (peer,),
            ).fetchone()
        if source is not None and source_identity(*source) != target:
            raise OperatorNeeded(
                "target: the store in target.store_dsn belongs to another database",
                hint="Name the store of the target's own bridge.",
            )
        if source is None or row is None:
            raise TargetUnavailable(
                f"target: its bridge does not have the mirror {peer!r} yet",
                hint=f"Add a mirror named {peer!r} to the file of the target's bridge, with two_way:"
                f" {{peer: {self._mirror.name}}}.",
            )
        *settings, self._tables = row
        self._require_fitting(peer, *settings)

    def require_table(self, table: TargetTable) -> None:
        """Check that the peer mirrors the table back. Without that, the target's log does not have its writes.

        Raises:
            OperatorNeeded: The peer does not take the table.
        """
        if not take(self._tables, table.full_name):
            peer = self._mirror.two_way.peer if self._mirror.two_way else ""
            raise OperatorNeeded(
                f"target: the mirror {peer!r} of the target's bridge does not take the table {table.full_name}, so its"
                " writes there would be overwritten",
                hint=f'Let both mirrors take the same tables, or leave this one out with "!{table.topic}".',
            )

    def _require_fitting(self, peer: str, conflict: Any, unique: str, named: str | None) -> None:
        if named != self._mirror.name:
            raise OperatorNeeded(
                f"target: the mirror {peer!r} of the target's bridge names {named!r} as its peer, not"
                f" {self._mirror.name!r}",
                hint="Two mirrors that name each other make a pair. Three sides that write cannot agree by the rules"
                " of two.",
            )
        wanted = self._opposite()
        if conflict != wanted:
            raise OperatorNeeded(
                f"target: the mirror {peer!r} has conflict: {_words(conflict)}, which does not fit conflict:"
                f" {_words(self._mirror.conflict)} here",
                hint=f"Give the mirror {peer!r} conflict: {_words(wanted)}, so that both sides choose the same winner.",
            )
        if unique != self._mirror.unique:
            raise OperatorNeeded(
                f"target: the mirror {peer!r} has unique: {unique}, but unique: {self._mirror.unique} is given here",
                hint="Give both mirrors the same value, so that both sides choose the same row.",
            )

    def _opposite(self) -> str | dict[str, str]:
        """Return the value of `conflict` that the peer needs, with the target's names of the tables."""
        mine = self._mirror.conflict
        if isinstance(mine, str):
            return _OPPOSITE.get(mine, mine)
        routes = {pattern: self._mirror.route(pattern).to if is_name(pattern) else pattern for pattern in mine}
        return {routes[pattern] or pattern: _OPPOSITE.get(rule, rule) for pattern, rule in mine.items()}

    def catch_up(self, target: Connection) -> None:
        """Wait until the target's log has everything that the target has committed.

        Args:
            target: The mirror's session on the target.

        Raises:
            BehindPeer: The target's bridge needs too long.
        """
        with target_errors():
            row = target.execute(
                "select l.lsn::text, pg_logical_emit_message(false, %s, '')"
                " from (select pg_current_wal_insert_lsn() as lsn offset 0) l",
                (PROBE_PREFIX,),
                prepare=True,
            ).fetchone()
        wanted = parse_lsn(row[0]) if row else 0
        deadline = time.monotonic() + PATIENCE
        while self.log_end() < wanted:
            if time.monotonic() > deadline:
                raise BehindPeer(
                    "target: its own bridge has not read its newest changes in time",
                    hint="Look at `cdcbridge lag` of the target's bridge.",
                )
            time.sleep(_PAUSE)

    def arrived_at(self, lsn: int) -> int | None:
        """Return the commit LSN in the target of the transaction that applied the source's changes up to `lsn`.

        None if the target's log does not have that transaction.
        """
        with store_errors():
            row = self.connection.execute(
                "select commit_lsn::text from transaction_marks where source = %s and mirror = %s and lsn = %s::pg_lsn"
                " order by commit_lsn desc limit 1",
                (self._source, self._mirror.name, format_lsn(lsn)),
            ).fetchone()
        return parse_lsn(row[0]) if row else None

    def log_end(self) -> int:
        """Return the LSN up to which the log has everything."""
        with store_errors():
            row = self.connection.execute(
                "select end_lsn::text from positions order by id desc limit 1", prepare=True
            ).fetchone()
        return parse_lsn(row[0]) if row else 0

    def own_writes(self, topic: str, keys: Sequence[str] | None, after: int, target: str) -> dict[str, OwnWrite]:
        """Return the last write of each key that the target made itself after the commit LSN `after`.

        Args:
            topic: The table, as the target names it.
            keys: The keys as the log has them. None: all keys that were written.
            after: A commit LSN of the target.
            target: The identity of the target.
        """
        with store_errors():
            rows = self.connection.execute(
                "select key, op, lsn::text, ordinal, effective_time,"
                " case when op <> 'delete' then (data -> 'record')::text end"
                " from own_writes(%s, %s, %s, %s::pg_lsn)",
                (topic, None if keys is None else list(keys), self._source, format_lsn(after)),
                prepare=True,
            ).fetchall()
        return {
            key: OwnWrite(Write(op, parse_lsn(lsn), at, target), ordinal, record)
            for key, op, lsn, ordinal, at, record in rows
        }
