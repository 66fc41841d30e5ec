"""List the bridges that run on a store: the leader and the standbys.

Each bridge holds advisory locks in a session of its own (store/leadership.py), so a bridge that died is not in the
list. This module only reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cdcbridge.database import Connection, store_errors
from cdcbridge.database.rights import guest
from cdcbridge.schemas import INTERNAL


@dataclass(slots=True, frozen=True)
class Process:
    """A bridge that runs now.

    Attributes:
        pid: The server process of its session on the store.
        holder: Its host and process, for example `db1 pid 4181`. None for a standby, or if a consumer's role asks.
        since: The time at which it took the lead or, for a standby, at which its session began. None if this role may
            not see it.
        seconds: Seconds since then.
    """

    pid: int
    leads: bool
    holder: str | None
    since: str | None
    seconds: float | None

    def __str__(self) -> str:
        who = f"{self.holder} leads" if self.leads and self.holder else "a bridge leads" if self.leads else "a standby"
        return f"{who} (session pid {self.pid}{f', since {self.since}' if self.since else ''})"


_RUNNING: Final = """
    select p.pid, p.leads, case when p.leads then n.holder end,
           to_char(case when p.leads then n.started_at else a.backend_start end, 'YYYY-MM-DD HH24:MI:SS TZ'),
           extract(epoch from clock_timestamp()
                              - case when p.leads then n.started_at else a.backend_start end)::float8
    from (select l.pid, bool_or(l.objid = 0) as leads from pg_locks l
          where l.locktype = 'advisory' and l.granted and l.classid = %(leaders)s::oid and l.objsubid = 2
            and l.objid in (0, 2) and l.pid <> pg_backend_pid()
            and l.database = (select oid from pg_database where datname = current_database())
          group by l.pid) p
    left join pg_stat_activity a using (pid)
    left join LEADER n on true
    order by p.leads desc, p.pid
"""
_LEADER: Final = "(select holder, started_at from leaders order by epoch desc limit 1)"
RUNNING: Final = _RUNNING.replace("LEADER", _LEADER)  # for the store's owner
_HIDDEN: Final = "(select null::text as holder, null::timestamptz as started_at)"  # for a consumer's role


def running(store: Connection) -> list[Process]:
    """List the bridges of this store, the leader first.

    The list is empty if the store has not been migrated.
    """
    with store_errors():
        row = store.execute(
            # Not to_regclass(), which finds nothing in a schema that a consumer's role may not use.
            "select c.oid::int8 from pg_class c join pg_namespace n on n.oid = c.relnamespace"
            " where c.relname = 'leaders' and n.nspname in (current_schema(), current_schema() || %s)",
            (INTERNAL,),
        ).fetchone()
        if row is None:
            return []
        query = _RUNNING.replace("LEADER", _HIDDEN) if guest(store) else RUNNING
        return [Process(*found) for found in store.execute(query.encode(), {"leaders": row[0]}).fetchall()]
