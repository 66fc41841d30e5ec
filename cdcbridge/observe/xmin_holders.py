"""List the holders of old row versions and old WAL: transactions, prepared transactions, slots and standbys.

Source: PostgreSQL manual, "Routine Vacuuming" and "pg_stat_activity". While old row versions are held, vacuum cannot
remove any. In a store they slow down each claim of a queue that rewrites its rows. The queues of cdcbridge do not
rewrite rows, but vacuum still frees no space. On the source, a slot keeps the WAL since the beginning of the oldest
transaction that writes. This module only reads, and never ends a transaction.
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
               left(query, 200) as query, backend_xid is not null as writes,
               usename::text as holder
        from pg_stat_activity
        where (backend_xmin is not null and datname = current_database()) or backend_xid is not null
        union all
        select 'prepared transaction', null, gid, age(transaction),
               extract(epoch from clock_timestamp() - prepared)::float8, null,
               format('owner %%s, database %%s', owner, database), true,
               owner::text
        from pg_prepared_xacts
        union all
        select 'slot', active_pid, slot_name, age(xmin), null, case when active then 'active' else 'inactive' end, null,
               false, null
        from pg_replication_slots where xmin is not null
        union all
        select 'standby', pid, application_name, age(backend_xmin), null, state, null, false, usename::text
        from pg_stat_replication where backend_xmin is not null
    )
    select kind, pid, name, age_xids, age_seconds, state, query, writes, holder from found
    where pid is distinct from pg_backend_pid() and (age_seconds >= %s or age_seconds is null and age_xids >= %s)
    order by age_seconds desc nulls last, age_xids desc limit 5
"""
_OLD_XIDS: Final = 100_000  # the least age, in transaction IDs, of a holder whose age in seconds is unknown


@dataclass(slots=True, frozen=True)
class HorizonHolder:
    """A holder of the xmin horizon.

    Attributes:
        server: "source", "store", or "both" if they are one server.
        pid: The process of the session. None if the holder has no session.
        writes: Whether the holder also makes slots keep WAL.
        user: The database role. None if the holder has none.
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
    user: str | None = None


def horizon_holders(connection: Connection, server: str, *, seconds: float = 1.0) -> list[HorizonHolder]:
    """Return the five oldest holders of the xmin horizon that have held it for at least `seconds`.

    Sessions of other roles are visible only with pg_monitor.
    """
    rows = connection.execute(_HOLDERS, (seconds, _OLD_XIDS)).fetchall()
    return [HorizonHolder(server, *row) for row in rows]
