"""Store conflicts in the target, in the transaction that decides them. Never decides one itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from cdcbridge.database import Connection
from cdcbridge.lsn import parse_lsn
from cdcbridge.mirrors.changes import MirroredChange
from cdcbridge.mirrors.peer_log import OwnWrite
from cdcbridge.mirrors.rule import Decision, Kind, Winner
from cdcbridge.mirrors.tables import TargetTable
from cdcbridge.mirrors.target import RowsJson, TargetSession

_INSERT: Final = """
    insert into conflicts (mirror, table_name, key, kind, source_row, target_row, source_position, target_position,
                           rule, winner, state, note, held_lsn)
    values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, case when %s then pg_current_wal_insert_lsn() end)
"""


@dataclass(slots=True, frozen=True)
class ConflictRow:
    """A row for the table `conflicts`.

    Attributes:
        change: The source's change.
        table: The table in the target, as schema.table.
        kind: The kind of the conflict.
        target_row: The target's row as JSON text, or None if there was none.
        target_position: The position of the target's last write of the row, or None.
        rule: The rule that decided, for example newest.
        winner: The side whose write is kept, or None for a hold.
        state: decided or held.
        note: The reason, if the rest does not give it.
    """

    change: MirroredChange
    table: str
    kind: Kind
    target_row: str | None
    target_position: str | None
    rule: str
    winner: Winner | None
    state: Literal["decided", "held"] = "decided"
    note: str | None = None


@dataclass(slots=True, frozen=True)
class Hold:
    """A row on hold: the id of its conflict, its table and key, and the LSN of the target at that time."""

    number: int
    table: str
    key: str
    lsn: int


def conflict_of(
    table: TargetTable,
    change: MirroredChange,
    target_row: str | None,
    own: OwnWrite | None,
    decision: Decision,
    rule: str,
    note: str | None = None,
) -> ConflictRow:
    """Return the row for a decision.

    Args:
        table: The table of the target.
        change: The source's change.
        target_row: The target's row as JSON text, or None if there was none.
        own: The target's last write of the row, or None if it is not known.
        decision: The decision.
        rule: The rule that decided.
        note: The reason, if the rest does not give it.
    """
    return ConflictRow(
        change,
        table.full_name,
        decision.kind or "update_exists",
        target_row,
        None if own is None else own.position,
        rule,
        decision.winner,
        "held" if decision.winner is None else "decided",
        note,
    )


def store_conflicts(target: TargetSession, mirror: str, rows: Sequence[ConflictRow]) -> None:
    """Insert the rows into the target's table `conflicts`."""
    if not rows:
        return
    with target.connection.cursor() as cursor:
        cursor.executemany(
            _INSERT,
            [
                (
                    mirror,
                    one.table,
                    one.change.row.key,
                    one.kind,
                    None if one.change.record is None else RowsJson(one.change.record.encode()),
                    one.target_row,
                    one.change.position,
                    one.target_position,
                    one.rule,
                    one.winner,
                    one.state,
                    one.note,
                    one.state == "held",
                )
                for one in rows
            ],
        )


def holds(target: TargetSession, mirror: str) -> list[Hold]:
    """Return the rows that are on hold."""
    found = target.connection.execute(
        "select id, table_name, key, held_lsn::text from conflicts where mirror = %s and state = 'held'", (mirror,)
    ).fetchall()
    return [Hold(number, table, key, parse_lsn(lsn)) for number, table, key, lsn in found]


def end_hold(target: TargetSession, number: int) -> None:
    """Note that the target itself has written the row again, which decides what was on hold."""
    target.connection.execute("update conflicts set state = 'superseded' where id = %s and state = 'held'", (number,))


def end_holds(target: TargetSession, mirror: str, keys: Iterable[tuple[str, str]]) -> None:
    """Note that later writes of these rows, given as (table, key), have decided what was on hold."""
    tables, texts = zip(*keys, strict=True) if keys else ((), ())
    target.connection.execute(
        "update conflicts c set state = 'superseded' from unnest(%s::text[], %s::text[]) k (table_name, key)"
        " where c.mirror = %s and c.state = 'held' and c.table_name = k.table_name and c.key = k.key",
        (list(tables), list(texts), mirror),
    )


def count_held(target: Connection, mirror: str) -> int:
    """Return how many conflicts of a mirror wait for a decision, at most 1,000."""
    row = target.execute(
        "select count(*) from (select from conflicts where state = 'held' and mirror = %s limit 1000) h", (mirror,)
    ).fetchone()
    return row[0] if row else 0
