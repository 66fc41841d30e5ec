"""Write the right row where two sides of a mirror differ, for `cdcbridge mirror verify --repair`.

The row is written on the side that is wrong, as a new change without a replication origin. With two_way, the mirror
back then applies a row that the other side has already. A row that anybody has written since the comparison is left
alone.
"""

from __future__ import annotations

from typing import Final, Literal

import psycopg

from cdcbridge.config import Mirror
from cdcbridge.database import Connection, source_errors, target_errors
from cdcbridge.errors import CdcbridgeError, OperatorNeeded
from cdcbridge.mirrors.compare import RowDifference, TableComparison
from cdcbridge.mirrors.row_texts import array
from cdcbridge.mirrors.target import rights_needed

_AT_ONCE: Final = 100  # rows of a transaction
Side = Literal["source", "target"]


def silence_triggers(target: Connection, mirror: Mirror) -> None:
    """Keep triggers and foreign keys of the target from running, as the mirror does.

    Raises:
        OperatorNeeded: The role may not do so.
    """
    if mirror.triggers != "replica":
        return
    try:
        target.execute("set session_replication_role = replica")
    except psycopg.errors.InsufficientPrivilege as error:
        row = target.execute("select quote_ident(current_user)").fetchone()
        raise OperatorNeeded(
            f"target: the role lacks a right that triggers: replica needs: {error.diag.message_primary}",
            hint=f"As a superuser of the target: {rights_needed(row[0] if row else '')[-1]}",
        ) from error


def repair(comparison: TableComparison, right: Side) -> None:
    """Write the rows that differ, and count them in the result. Rows on hold are left alone.

    Args:
        comparison: A comparison after its second look.
        right: The side whose rows are right.

    Raises:
        CdcbridgeError: A row cannot be written, for example because of a constraint.
    """
    found = [one for one in comparison.result.differences if not one.held]
    for start in range(0, len(found), _AT_ONCE):
        comparison.result.fixed += _write(comparison, right, found[start : start + _AT_ONCE])


def _write(comparison: TableComparison, right: Side, found: list[RowDifference]) -> int:
    wrong: Side = "target" if right == "source" else "source"
    connection = getattr(comparison, wrong)
    table = comparison.theirs if wrong == "target" else comparison.ours
    with target_errors() if wrong == "target" else source_errors(), connection.transaction():
        now = {one.identity: one for one in comparison.look([one.seen.identity for one in found], lock=wrong)}
        same = [one.seen for one in found if now[one.seen.identity] == one.seen]
        gone = [one.identity for one in same if getattr(one, right) is None]
        new = [getattr(one, right) for one in same if getattr(one, wrong) is None]
        changed = [getattr(one, right) for one in same if None not in (one.source, one.target)]
        statements = (
            (table.statement("delete", table.key), gone),
            (table.statement("insert", comparison.columns), new),
            (table.statement("update", comparison.columns), changed),
        )
        try:
            for statement, rows in statements:
                if rows:
                    connection.execute(statement, (array(rows),))
        except psycopg.errors.IntegrityError as error:
            raise CdcbridgeError(
                f"{wrong}: a row of {table.full_name} cannot be written: {error.diag.message_primary}:"
                f" {error.diag.message_detail}",
                hint="Correct the row by hand, then verify again.",
            ) from error
    return len(same)
