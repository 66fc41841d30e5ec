"""Read the conflicts that a mirror stored in its target, and apply the losing row of one.

The losing row is written as a new change of the target, in a transaction without a replication origin, so a second
direction mirrors it back. Never decides a conflict by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

import psycopg

from cdcbridge.config import Mirror
from cdcbridge.database import Connection, connect_target, target_errors
from cdcbridge.errors import CdcbridgeError, UsageError
from cdcbridge.mirrors.changes import columns_of
from cdcbridge.mirrors.row_texts import array, identity, row_key
from cdcbridge.mirrors.source_tables import SourceTables
from cdcbridge.mirrors.tables import TargetTable
from cdcbridge.mirrors.target_tables import read_columns

_CONFLICTS: Final = """
    select id, at, mirror, table_name, key, kind, source_row::text, target_row::text, source_position, target_position,
           rule, winner, state, note
    from conflicts where mirror = %s """
Did = Literal["inserted", "updated", "deleted"]


@dataclass(slots=True, frozen=True)
class StoredConflict:
    """A row of the table `conflicts`, whose rows are JSON text. docs/SQL.md describes the columns."""

    id: int
    at: datetime
    mirror: str
    table_name: str
    key: str | None
    kind: str
    source_row: str | None
    target_row: str | None
    source_position: str
    target_position: str | None
    rule: str
    winner: str | None
    state: str
    note: str | None

    @property
    def loser(self) -> str | None:
        """The row that flip() writes. None: the losing side deleted the row."""
        return self.target_row if self.winner == "source" else self.source_row

    @property
    def kept(self) -> str | None:
        """The row that the target has had since the decision. None: it has none."""
        return self.source_row if self.winner == "source" else self.target_row


@dataclass(slots=True, frozen=True)
class Flipped:
    """The result of flip().

    Attributes:
        did: What happened to the row of the target.
        before: The row before, as JSON text, or None.
        row: The row that was written, or None for a delete.
        held: How many conflicts of the mirror are still on hold.
    """

    did: Did
    before: str | None
    row: str | None
    held: int


def open_target(mirror: Mirror) -> Connection:
    """Open a session on the target of a mirror."""
    return connect_target(mirror.target.dsn.get_secret_value(), mirror.target.schema_)


def stored_place(target: Connection, mirror: Mirror) -> tuple[int, str, datetime] | None:
    """Return the seq, the commit LSN and the time of a mirror's place in its target, or None before the first one."""
    with target_errors():
        if target.execute("select to_regclass('mirror_places')").fetchone() == (None,):
            return None
        return target.execute(
            "select seq, commit_lsn::text, updated_at from mirror_places where mirror = %s"
            " order by updated_at desc, id desc limit 1",
            (mirror.name,),
        ).fetchone()


def stored_conflicts(
    target: Connection, mirror: Mirror, *, held: bool = False, table: str | None = None, limit: int = 100
) -> list[StoredConflict]:
    """Return the conflicts that a mirror has found, the newest first.

    Args:
        target: A session on the target.
        mirror: The mirror.
        held: Only those that wait for a decision.
        table: Only those of this table, as the source or the target names it.
        limit: The most conflicts to return.
    """
    tables = None if table is None else [table, mirror.route(table).to]
    with target_errors():
        if not _has_conflicts(target):
            return []
        rows = target.execute(
            _CONFLICTS.encode() + b"and (not %s or state = 'held') and (%s::text[] is null or table_name = any (%s))"
            b" order by id desc limit %s",
            (mirror.name, held, tables, tables, limit),
        ).fetchall()
    return [StoredConflict(*row) for row in rows]


def stored_conflict(target: Connection, mirror: Mirror, number: int, *, lock: bool = False) -> StoredConflict:
    """Return one conflict of a mirror by its id.

    Raises:
        UsageError: The mirror has no such conflict.
    """
    row = None
    with target_errors():
        if _has_conflicts(target):
            query = f"{_CONFLICTS} and id = %s {'for update' if lock else ''}"
            row = target.execute(query.encode(), (mirror.name, number)).fetchone()
    if row is None:
        raise UsageError(
            f"the mirror {mirror.name!r} has no conflict {number}",
            hint=f"`cdcbridge mirror conflicts list --mirror {mirror.name}` lists them.",
        )
    return StoredConflict(*row)


def _has_conflicts(target: Connection) -> bool:
    return target.execute("select to_regclass('conflicts')").fetchone() != (None,)


def flip(target: Connection, source: SourceTables, mirror: Mirror, number: int, *, force: bool = False) -> Flipped:
    """Write the losing row of a conflict to the target, or delete the row if the losing side had deleted it.

    Args:
        target: A session on the target, outside of a transaction.
        source: Answers questions about the source's tables.
        mirror: The mirror.
        number: The id of the conflict.
        force: Also if the row has changed since the decision.

    Raises:
        UsageError: There is no such conflict, or it was flipped before.
        CdcbridgeError: The row has changed since, or cannot be written.
    """
    with target_errors(), target.transaction():
        conflict = stored_conflict(target, mirror, number, lock=True)
        _require_open(conflict, force=force)
        table = _described(target, source, mirror, conflict)
        loser = conflict.loser
        key = conflict.key if loser is None else row_key(loser, table.key)
        which = array([identity(key or "", table.key)])
        found = target.execute(table.statement("present", table.key), (which,)).fetchone()
        before = None if found is None else found[1]
        if not force:
            _require_same(target, table, conflict, key, before)
        did = _write(target, table, conflict, which, exists=before is not None)
        target.execute(
            "update conflicts set state = 'flipped' where id = %s or (state = 'held' and table_name = %s and key = %s)",
            (number, conflict.table_name, conflict.key),
        )
        left = target.execute(
            "select count(*) from conflicts where mirror = %s and state = 'held'", (mirror.name,)
        ).fetchone()
    return Flipped(did, before, conflict.loser, left[0] if left else 0)


def _require_open(conflict: StoredConflict, *, force: bool) -> None:
    if conflict.state == "flipped":
        raise UsageError(f"conflict {conflict.id} was flipped before")
    if conflict.state == "superseded" and not force:
        raise CdcbridgeError(
            f"a later write of {conflict.table_name} {conflict.key} has decided conflict {conflict.id}",
            hint="--force writes the losing row all the same.",
        )
    if conflict.key is None:
        raise UsageError(f"conflict {conflict.id} is about a row without a key")


def _described(target: Connection, source: SourceTables, mirror: Mirror, conflict: StoredConflict) -> TargetTable:
    """Return the description of the conflict's table in the target."""
    topic = mirror.topic(conflict.table_name)
    schema, _, name = conflict.table_name.partition(".")
    columns = read_columns(target, conflict.table_name)
    if not columns:
        raise CdcbridgeError(f"target: there is no table {conflict.table_name} any more")
    return TargetTable(topic, schema, name, columns, source.key(topic), mirror.route(topic))


def _columns(table: TargetTable, row: str) -> tuple[str, ...]:
    """Return those columns of a stored row that the table still has and that can be written."""
    return table.written(name for name in columns_of(row) if name in table.columns)


def _require_same(
    target: Connection, table: TargetTable, conflict: StoredConflict, key: str | None, now: str | None
) -> None:
    """Raise an error if the target's row is not the one that the decision left."""
    kept = conflict.kept
    if kept is not None and row_key(kept, table.key) != key:
        return  # a conflict about a unique constraint: the row that is in the way has another key
    if kept is None or now is None:
        same = kept is None and now is None
    else:
        statement = table.statement("equal", _columns(table, kept))
        same = bool(target.execute(statement, (array([kept]),)).fetchone())
    if not same:
        raise CdcbridgeError(
            f"the row {conflict.key} of {conflict.table_name} has changed since conflict {conflict.id}.\n"
            f"    then: {kept or 'no row'}\n    now:  {now or 'no row'}",
            hint="--force writes the losing row all the same.",
        )


def _write(target: Connection, table: TargetTable, conflict: StoredConflict, which: str, *, exists: bool) -> Did:
    row = conflict.loser
    if row is None:
        if not exists:
            raise UsageError(
                f"nothing to do: the losing side of conflict {conflict.id} had no row, and the target has none"
            )
        target.execute(table.statement("delete", table.key), (which,))
        return "deleted"
    try:
        target.execute(table.statement("update" if exists else "insert", _columns(table, row)), (array([row]),))
    except psycopg.errors.IntegrityError as error:
        raise CdcbridgeError(
            f"target: the losing row cannot be written: {error.diag.message_primary}: {error.diag.message_detail}",
            hint="Change or delete the row that is in the way, then flip again.",
        ) from error
    return "updated" if exists else "inserted"
