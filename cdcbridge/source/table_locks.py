"""Find the sessions with locks for which a change of a publication would wait.

ALTER PUBLICATION locks each table that it names. A session that holds a conflicting lock, for example through `lock
table`, VACUUM or CREATE INDEX, would make it wait. Every later session that needs the table would then wait too. This
module never takes a lock itself.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from cdcbridge.database import Connection, source_errors

_QUERY_LENGTH: Final = 200  # characters of a query that are shown
# The modes that conflict with SHARE UPDATE EXCLUSIVE. An autovacuum gives way to any session that waits for its lock.
_HOLDERS: Final = f"""
    select n.nspname || '.' || c.relname, l.mode, a.pid, a.usename, a.state,
           left(regexp_replace(a.query, '\\s+', ' ', 'g'), {_QUERY_LENGTH}),
           (select p.gid from pg_prepared_xacts p where '-1/' || p.transaction = l.virtualtransaction)
    from pg_locks l join pg_class c on c.oid = l.relation join pg_namespace n on n.oid = c.relnamespace
    left join pg_stat_activity a using (pid)
    where l.locktype = 'relation' and l.granted and l.pid is distinct from pg_backend_pid()
      and l.database = (select oid from pg_database where datname = current_database())
      and l.mode not in ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock')
      and a.backend_type is distinct from 'autovacuum worker'
      and n.nspname || '.' || c.relname = any (%s)
    order by a.pid, 1, 2
"""  # noqa: S608 - made of constants alone


@dataclass(slots=True, frozen=True)
class LockHolder:
    """A session, or a prepared transaction, that holds a lock on a table. For the latter, `pid` is None."""

    table: str
    mode: str
    pid: int | None
    role: str | None
    state: str | None
    query: str | None
    prepared: str | None

    @property
    def said(self) -> str:
        held = f"holds a {self.mode} on {self.table}"
        if self.pid is None:
            return f"the prepared transaction {self.prepared!r} {held}"
        return f"pid {self.pid} ({self.role}, {self.state}) {held}: {self.query}"

    @property
    def fix(self) -> str:
        if self.pid is None:
            return f"commit prepared '{self.prepared}'; -- or roll it back"
        return f"select pg_terminate_backend({self.pid}); -- or wait until it ends"


def holders(connection: Connection, tables: Collection[str]) -> list[LockHolder]:
    """Return the holders of locks on these tables for which ALTER PUBLICATION would wait."""
    with source_errors():
        rows = connection.execute(_HOLDERS.encode(), (sorted(tables),)).fetchall()
    return [LockHolder(*row) for row in rows]
