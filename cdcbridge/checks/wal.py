"""Check how much WAL a slot may keep, and whether the role may use slots.

This module reads the source and never changes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from cdcbridge.config import Config
from cdcbridge.database import Connection
from cdcbridge.problem import Problem
from cdcbridge.units import format_size, human_size

_SETTINGS: Final = """
    select nullif(max(setting) filter (where name = 'max_slot_wal_keep_size'), '-1')::bigint * 1048576,
           max(setting) filter (where name = 'idle_replication_slot_timeout')::bigint
    from pg_settings where name in ('max_slot_wal_keep_size', 'idle_replication_slot_timeout')
"""
# A managed service has no superuser to give the attribute. It has a role instead, for example rds_replication.
_REPLICATES: Final = """
    select u.rolreplication or u.rolsuper or coalesce(pg_has_role(u.oid, r.oid, 'member'), false),
           quote_ident(u.rolname), r.oid is not null
    from pg_roles u left join pg_roles r on r.rolname = 'rds_replication'
    where u.rolname = current_user
"""
_TIMES_ALARM: Final = 5  # the proposed limit, in multiples of max_retained_wal


def replication_right(connection: Connection) -> Iterator[Problem]:
    """Yield a problem if the current role may not use replication slots."""
    row = connection.execute(_REPLICATES).fetchone()
    if row and not row[0]:
        message, fix = "A superuser can grant that right", f"alter role {row[1]} replication;"
        if row[2]:
            message, fix = "A member of rds_superuser can grant that right", f"grant rds_replication to {row[1]};"
        message = f"the role {row[1]} may not use replication slots. {message}"
        yield Problem("privilege_replication", "error", row[1], message, fix)


def wal_problems(config: Config, connection: Connection) -> Iterator[Problem]:
    """Yield server limits that let a slot fill the disk, or that lose the slot before an alarm begins."""
    row = connection.execute(_SETTINGS).fetchone()
    limit, idle = row or (None, None)
    alarm = config.source.max_retained_wal
    if limit is None:
        yield Problem(
            "wal_unlimited",
            "warning",
            "max_slot_wal_keep_size",
            "max_slot_wal_keep_size is -1: while no bridge reads the slot it keeps WAL until the disk is full, and then"
            " the server stops",
            _limit(alarm),
        )
    elif limit <= alarm:
        yield Problem(
            "wal_limit_before_alarm",
            "warning",
            "source.max_retained_wal",
            f"max_slot_wal_keep_size is {human_size(limit)}: the slot is lost before the alarm at"
            f" source.max_retained_wal, {human_size(alarm)}",
            f"Set source.max_retained_wal to {format_size(limit // 2)} or less, or raise the limit: {_limit(alarm)}",
        )
    if idle:
        yield Problem(
            "slot_idle_timeout",
            "warning",
            "idle_replication_slot_timeout",
            f"idle_replication_slot_timeout is {idle} s: the server removes a slot that no bridge has read for that"
            " long",
            "alter system set idle_replication_slot_timeout = 0; select pg_reload_conf(); -- as a superuser",
        )


def _limit(alarm: int) -> str:
    """Return the SQL that limits the WAL of a slot. `alarm` is source.max_retained_wal in bytes."""
    megabytes = max(1024, _TIMES_ALARM * alarm // 1048576)
    return (
        f"alter system set max_slot_wal_keep_size = '{megabytes}MB'; select pg_reload_conf(); -- as a superuser. Choose"
        " a size that the disk can hold. A managed service has a parameter of this name"
    )
