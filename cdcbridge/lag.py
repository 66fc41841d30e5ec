"""How far things are: slots on the source, consumers in the store. Part of the rim; reads only, needs no bridge."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from psycopg.rows import dict_row

from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_source, connect_store, source_errors, store_errors
from cdcbridge.lsn import format_lsn, parse_lsn
from cdcbridge.migrate import schema_version
from cdcbridge.source import Slot, current_lsn, slots


@dataclass(slots=True, frozen=True)
class SlotLag:
    """One slot: sizes in bytes; lag_seconds is the age of the oldest commit not yet confirmed, None if unknown."""

    name: str
    plugin: str
    active: bool
    wal_status: str
    restart_lsn: str | None
    confirmed_flush_lsn: str | None
    current_lsn: str
    retained_bytes: int | None
    lag_bytes: int | None
    lag_seconds: float | None


@dataclass(slots=True, frozen=True)
class ConsumerLag:
    """One consumer: messages waiting, in flight, dead; age of the oldest unfinished one."""

    name: str
    mode: str
    pending: int
    in_flight: int
    dead: int
    oldest_age_seconds: float | None


@dataclass(slots=True, frozen=True)
class Holder:
    """A transaction that published and is open: no group reads its `seq` and what lies behind it before it ends."""

    pid: int
    seq: int
    age_seconds: float
    state: str | None
    query: str | None


@dataclass(slots=True, frozen=True)
class Lag:
    """What `cdcbridge lag` shows. `holders`: the oldest first; those of the last second are not told."""

    slots: list[SlotLag]
    consumers: list[ConsumerLag]
    holders: tuple[Holder, ...] = ()
    backfills: tuple[dict[str, Any], ...] = ()  # unfinished ones, as backfill_status() has them
    gone: tuple[str, ...] = ()  # slots that the store goes by and the source has not

    @property
    def lost(self) -> list[str]:
        return [*self.gone, *(slot.name for slot in self.slots if slot.wal_status == "lost")]

    def as_json(self) -> dict[str, Any]:
        return {
            "slots": [asdict(slot) for slot in self.slots],
            "consumers": [asdict(c) for c in self.consumers],
            "holders": [asdict(h) for h in self.holders],
            "backfills": list(self.backfills),
        }


_STREAM: Final = """
    select r.sent_lsn::text, r.write_lsn::text, pg_current_wal_flush_lsn()::text
    from pg_stat_replication r where r.pid = %s
"""


def measure(config: Config) -> Lag:
    """Look at both sides once. Raises SourceUnavailable or StoreUnavailable."""
    with connect_source(config.source_dsn, "cdcbridge lag") as connection:
        found = slots(connection, config.source.slot)
        current = current_lsn(connection)
        idle = {slot.name: _caught_up(connection, slot, current) for slot in found}
    with connect_store(config.store_dsn, config.store.schema_, "cdcbridge lag") as store:
        if schema_version(store) == 0:
            return Lag([_slot(slot, current, None) for slot in found], [])
        with store_errors():
            age = store.execute(
                "select greatest(0, extract(epoch from clock_timestamp() - commit_time))::float8 from positions"
                " order by id desc limit 1"
            ).fetchone()
            rows = store.execute("select * from consumer_lag()").fetchall()
            holders = store.execute("select * from safe_seq_holders() where age_seconds >= 1").fetchall()
            with store.cursor(row_factory=dict_row) as cursor:
                backfills = cursor.execute(
                    "select * from backfill_status() where state in ('waiting', 'running', 'paused', 'failed')"
                ).fetchall()
            known = [name for (name,) in store.execute("select slot from source").fetchall()]
    behind = age[0] if age else None
    return Lag(
        [_slot(slot, current, 0.0 if idle[slot.name] else behind) for slot in found],
        [ConsumerLag(*row) for row in rows],
        tuple(Holder(*row) for row in holders),
        tuple(backfills),
        tuple(name for name in known if not found and name == config.source.slot),
    )


def stored_slot(config: Config) -> str | None:
    """The slot that the store's position is of, or None before the first start."""
    with connect_store(config.store_dsn, config.store.schema_, "cdcbridge cli") as store:
        if schema_version(store) == 0:
            return None
        with store_errors():
            row = store.execute("select slot from source").fetchone()
    return row[0] if row else None


def _caught_up(connection: Connection, slot: Slot, current: int) -> bool:
    """Nothing committed waits: the bridge says that it has written (or needs not) all that the server has sent."""
    if slot.confirmed_flush_lsn is not None and slot.confirmed_flush_lsn >= current:
        return True
    with source_errors():
        row = connection.execute(_STREAM, (slot.active_pid,)).fetchone()
    if row is None or row[0] is None or row[1] is None:
        return False
    sent, written, flushed = (parse_lsn(lsn) for lsn in row)
    return written >= sent >= flushed


def _slot(slot: Slot, current: int, seconds: float | None) -> SlotLag:
    lag = None if slot.confirmed_flush_lsn is None else max(0, current - slot.confirmed_flush_lsn)
    return SlotLag(
        slot.name,
        slot.plugin,
        slot.active_pid is not None,
        slot.wal_status or "unknown",
        None if slot.restart_lsn is None else format_lsn(slot.restart_lsn),
        None if slot.confirmed_flush_lsn is None else format_lsn(slot.confirmed_flush_lsn),
        format_lsn(current),
        None if slot.restart_lsn is None else max(0, current - slot.restart_lsn),
        lag,
        None if slot.wal_status == "lost" else seconds,
    )
