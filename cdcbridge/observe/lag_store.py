"""Measure the store's half of `cdcbridge lag`: consumers, the transactions that hold them up, and backfills.

This module only reads, and never waits for a bridge.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from psycopg.rows import dict_row

from cdcbridge.config import Config
from cdcbridge.database import Connection, store_errors
from cdcbridge.database.pooled import connect_for_calls
from cdcbridge.database.rights import Guest, guest
from cdcbridge.observe.consumer_lag import ConsumerLag, consumer_lags
from cdcbridge.observe.mirrors import MirrorLag, mirror_lags
from cdcbridge.observe.sinks import SinkState, sink_states
from cdcbridge.observe.xmin_holders import HorizonHolder, horizon_holders
from cdcbridge.store.feed_watch import stored_feeds
from cdcbridge.store.feeds import Feeds
from cdcbridge.store.holders import ConsumerHolder, consumer_holders
from cdcbridge.store.migrate import schema_version

HELD_FOR: Final = 0.5  # seconds before a transaction of a receiver, group member or publisher is shown


@dataclass(slots=True, frozen=True)
class OpenPublisher:
    """An open transaction that has published. No group reads its `seq` or a later one before it ends."""

    pid: int
    seq: int
    age_seconds: float
    state: str | None
    query: str | None


@dataclass(slots=True)
class StoreSide:
    """The measurements of the store, with times in seconds.

    Attributes:
        behind: Age of the newest commit in the store.
        silent: Time since the last append.
    """

    server: str | None = None  # its system identifier
    behind: float | None = None
    silent: float | None = None
    consumers: list[ConsumerLag] = field(default_factory=list)
    holders: tuple[OpenPublisher, ...] = ()
    backfills: tuple[dict[str, Any], ...] = ()
    slots: tuple[str, ...] = ()
    horizon: tuple[HorizonHolder, ...] = ()
    error: str | None = None
    held: tuple[ConsumerHolder, ...] = ()
    guest: Guest | None = None
    feeds: Feeds | None = None
    sinks: tuple[SinkState, ...] = ()
    mirrors: tuple[MirrorLag, ...] = ()


def store_side(config: Config) -> StoreSide:
    """Look at the store once. A consumer's role sees only its own consumers."""
    with connect_for_calls(config.store_dsn, config.store.schema_, "cdcbridge lag") as store:
        with store_errors():
            who = guest(store)
        if who is not None:
            return _guests_side(store, who)
        if schema_version(store) == 0:
            return StoreSide()
        with store_errors(), store.transaction():
            age = store.execute(
                "select greatest(0, extract(epoch from clock_timestamp() - commit_time))::float8,"
                " greatest(0, extract(epoch from clock_timestamp() - recorded_at))::float8"
                " from positions order by id desc limit 1"
            ).fetchone() or (None, None)
            with store.cursor(row_factory=dict_row) as cursor:
                backfills = cursor.execute(
                    "select * from backfill_status() where state in ('waiting', 'running', 'paused', 'failed')"
                ).fetchall()
            consumers = consumer_lags(store)
            return StoreSide(
                _server(store),
                age[0],
                age[1],
                consumers,
                tuple(
                    OpenPublisher(*row)
                    for row in store.execute("select * from safe_seq_holders() where age_seconds >= 1")
                ),
                tuple(backfills),
                tuple(name for (name,) in store.execute("select slot from source")),
                tuple(horizon_holders(store, "store")),
                held=tuple(consumer_holders(store, seconds=HELD_FOR)),
                feeds=stored_feeds(store),
                sinks=tuple(sink_states(store, config, consumers)),
                mirrors=tuple(mirror_lags(store, config, consumers)),
            )


def _guests_side(store: Connection, who: Guest) -> StoreSide:
    with store_errors(), store.transaction():
        return StoreSide(
            _server(store),
            consumers=consumer_lags(store),
            held=tuple(consumer_holders(store, seconds=HELD_FOR)),
            guest=who,
        )


def _server(store: Connection) -> str | None:
    row = store.execute("select system_identifier::text from pg_control_system()").fetchone()
    return None if row is None else row[0]
