"""The gap messages of the last 24 hours as sentences, for `cdcbridge status`. Part of the rim; reads only.

After a gap the bridge works again, and its consumers still lack rows. For example, an operator ran `slot recreate` at
3 a.m., and no backfill has begun yet. This module never reads the log: the append of a gap message also notes the gap.
"""

from __future__ import annotations

from typing import Any, Final

from cdcbridge.database import Connection, store_errors
from cdcbridge.units import human_duration

_MOST: Final = 3  # that are told; a session may leave one for each of many consumers
_NAMES: Final = 3
# Consumers that have been removed miss nothing. The end of a table's gap takes the place of its beginning.
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
    """Name each recent gap, the latest first, with what is to be done.

    Empty in a store of an older version, and for a role that may not read the table, which is new.
    """
    with store_errors():
        if store.execute("select has_table_privilege(to_regclass('gaps'), 'select')").fetchone() != (True,):
            return []
        found = [row for row in store.execute(_RECENT).fetchall() if row[3]]
    lines = [_told(*row) for row in found[:_MOST]]
    if len(found) > _MOST:
        lines.append(f"{len(found) - _MOST} earlier gaps within 24 h: the store's table `gaps` has them")
    return lines


def _told(at: str, seconds: float, record: dict[str, Any], names: list[str]) -> str:
    """For example "a gap 2 min ago: changes from 0/15 to 0/16 may be missing for billing"."""
    upto = f"to {record['to']}" if record.get("to") else "on"
    reason = f" ({record['reason']})" if record.get("reason") else ""
    who = ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "")
    table = record.get("table", "TABLE")
    return (
        f"a gap {human_duration(max(0.0, seconds))} ago, at {at}: changes from {record['from']} {upto}"
        f" {'may be' if reason else 'are'} missing for {who}{reason}. Compare: `cdcbridge verify {table}`; fill:"
        f" `cdcbridge backfill start {names[0] if len(names) == 1 else 'CONSUMER'} {table}`. Shown for 24 h"
    )
