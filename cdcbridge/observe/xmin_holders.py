"""Who holds old row versions and old WAL: transactions, prepared ones, slots, standbys. Part of the rim; reads only.

Source: PostgreSQL manual, "Routine Vacuuming" and "pg_stat_activity". Old versions in the store make each claim dearer
where a queue's design rewrites rows; ours does not, but vacuum frees nothing. On the source, a slot keeps the WAL since
the beginning of the oldest transaction that writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cdcbridge.database import Connection

_HOLDERS: Final = """
    with found as (
        select 'transaction' as kind, pid, coalesce(nullif(application_name, ''), usename) as name,
               greatest(age(backend_xmin), age(backend_xid)) as age_xids,
               extract(epoch from clock_timestamp() - xact_start)::float8 as age_seconds, state,
               left(query, 200) as query, backend_xid is not null as writes
        from pg_stat_activity
        where (backend_xmin is not null and datname = current_database()) or backend_xid is not null
        union all
        select 'prepared transaction', null, gid, age(transaction),
               extract(epoch from clock_timestamp() - prepared)::float8, null,
               format('owner %%s, database %%s', owner, database), true
        from pg_prepared_xacts
        union all
        select 'slot', active_pid, slot_name, age(xmin), null, case when active then 'active' else 'inactive' end, null,
               false
        from pg_replication_slots where xmin is not null
        union all
        select 'standby', pid, application_name, age(backend_xmin), null, state, null, false
        from pg_stat_replication where backend_xmin is not null
    )
    select kind, pid, name, age_xids, age_seconds, state, query, writes from found
    where pid is distinct from pg_backend_pid() and (age_seconds >= %s or age_seconds is null and age_xids >= %s)
    order by age_seconds desc nulls last, age_xids desc limit 5
"""
_OLD_XIDS: Final = 100_000  # of what has no age in seconds


@dataclass(slots=True, frozen=True)
class HorizonHolder:
    """`server`: source, store, or both where they are one; `pid` None: of no session; `writes`: holds WAL for slots,
    too.
    """

    server: str
    kind: str
    pid: int | None
    name: str | None
    age_xids: int | None
    age_seconds: float | None
    state: str | None
    query: str | None
    writes: bool


def horizon_holders(connection: Connection, server: str, *, seconds: float = 1.0) -> list[HorizonHolder]:
    """The five oldest that hold the xmin horizon, from `seconds` on. Others' sessions are seen with pg_monitor only."""
    rows = connection.execute(_HOLDERS, (seconds, _OLD_XIDS)).fetchall()
    return [HorizonHolder(server, *row) for row in rows]
