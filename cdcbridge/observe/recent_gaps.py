"""Describe the gap messages of the last 24 hours in sentences, for `cdcbridge status`.

After a gap the bridge works again, and its consumers still lack rows. For example, an operator ran `slot recreate` at
night, and no backfill has begun yet. This module only reads the table `gaps`, in which the append of a gap message also
records the gap. It never reads the log.
"""

from __future__ import annotations

from typing import Any, Final

from cdcbridge.database import Connection, store_errors
from cdcbridge.units import human_duration

_MOST: Final = 3  # gaps to describe; a streaming session may leave one for each of many consumers
_NAMES: Final = 3  # consumers to name for each gap
# Consumers that were removed are left out, and so are gaps without any other consumer. If the gap of a table has ended,
# the second message replaces the first one.
_RECENT: Final = """
    select to_char(g.at, 'YYYY-MM-DD HH24:MI:SS TZ'), extract(epoch from clock_timestamp() - g.at)::float8, g.record,
           array(select c.name from consumers c where c.name = any (g.consumers) and c.created_at <= g.at order by 1)
    from gaps g
    where g.at > clock_timestamp() - interval '24 hours'
      and not exists (select from gaps n where n.id > g.id and n.record ->> 'table' = g.record ->> 'table'
                                           and n.record ->> 'from' = g.record ->> 'from')
    order by g.id desc
"""


def recent_gaps(store: Connection) -> list[str]:
    """Return a sentence about each recent gap, the latest first, with the commands that compare and fill.

    The result is empty in a store of an older version, which has no table `gaps`. It is also empty for a role that may
    not read that table.
    """
    with store_errors():
        if store.execute("select has_table_privilege(to_regclass('gaps'), 'select')").fetchone() != (True,):
            return []
        found = [row for row in store.execute(_RECENT).fetchall() if row[3]]
    lines = [_told(*row) for row in found[:_MOST]]
    if len(found) > _MOST:
        lines.append(f"{len(found) - _MOST} earlier gaps within 24 h: the store's table `gaps` lists them")
    return lines


def _told(at: str, seconds: float, record: dict[str, Any], names: list[str]) -> str:
    """Return, for example, "a gap 2 min ago: changes from 0/15 to 0/16 may be missing for billing"."""
    upto = f"to {record['to']}" if record.get("to") else "on"
    reason = f" ({record['reason']})" if record.get("reason") else ""
    who = ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "")
    table = record.get("table", "TABLE")
    return (
        f"a gap {human_duration(max(0.0, seconds))} ago, at {at}: changes from {record['from']} {upto}"
        f" {'may be' if reason else 'are'} missing for {who}{reason}. Compare: `cdcbridge verify {table}`. Fill:"
        f" `cdcbridge backfill start {names[0] if len(names) == 1 else 'CONSUMER'} {table}`. Shown for 24 h"
    )
