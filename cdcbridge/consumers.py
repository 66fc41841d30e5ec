"""The consumers of the file, brought into the store. Part of the rim.

Adds and changes; never removes by itself: a consumer that left the file keeps what waits for it and gets nothing new.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
import structlog
from psycopg.types.json import Jsonb

from cdcbridge.collect import Batch
from cdcbridge.config import Consumer
from cdcbridge.database import Connection, store_errors
from cdcbridge.encode import COPY_HEADER, COPY_TRAILER, COPY_WAITING, GAP_TOPIC, key_text
from cdcbridge.errors import UsageError
from cdcbridge.fan_out import barrier_rows, waiting_rows
from cdcbridge.filters import Filter, FilterError
from cdcbridge.route import Subscription

_PAGE: Final = 5000  # messages of the log that a new consumer with start: earliest is given at a time
_TELL_EVERY: Final = 2.0  # seconds between two lines about a long filling
log = structlog.get_logger()


@dataclass(slots=True, frozen=True)
class Applied:
    """What apply() did, by consumer name."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    left: tuple[str, ...]


def stored_config(consumer: Consumer) -> dict[str, Any]:
    """The consumer as the store keeps it: durations in seconds, sizes in bytes."""
    dumped = consumer.model_dump(mode="python", exclude={"name", "mode"}, exclude_none=True)
    return orjson.loads(orjson.dumps(dumped))  # type: ignore[no-any-return]


def subscription(consumer_id: int, name: str, mode: str, config: dict[str, Any]) -> Subscription:
    """What routing needs of a consumer as the store keeps it."""
    source = config.get("filter")
    return Subscription(
        consumer_id,
        name,
        tuple(config["tables"]),
        frozenset(config["operations"]),
        Filter(source) if source is not None else None,
        tuple(config["key"]) if config.get("key") else None,
        config["max_message_bytes"],
        mode == "fifo",
        tuple(config.get("topics", ())),
        mode == "stream",
    )


def apply(connection: Connection, consumers: Sequence[Consumer], *, fence: bool = False) -> Applied:
    """Make the store's consumers those of the file, in one transaction.

    A new one with start: earliest gets what the log holds; with start: now what the bridge reads from here on. A
    changed one is routed anew from the next change; what it has queued already stays as it is. `fence`: a bridge that
    runs with the old ones can append nothing more, and starts again with these.
    """
    with store_errors(), connection.transaction():
        rows = connection.execute("select id, name, mode, config from consumers order by name for update").fetchall()
        known = {name: (consumer_id, mode, config) for consumer_id, name, mode, config in rows}
        added, changed = [], []
        for consumer in consumers:
            config = stored_config(consumer)
            if consumer.role is not None:
                connection.execute("select use_role(%s)", (consumer.role,))
            if consumer.name not in known:
                _add(connection, consumer, config)
                added.append(consumer.name)
                continue
            consumer_id, mode, had = known[consumer.name]
            if mode != consumer.mode:
                raise UsageError(
                    f"consumer {consumer.name!r} has mode {mode}; it cannot become {consumer.mode}",
                    hint=f"Give it another name, or remove it first: cdcbridge consumers remove {consumer.name}",
                )
            if had != config:
                connection.execute(
                    "update consumers set config = %s, updated_at = now() where id = %s", (Jsonb(config), consumer_id)
                )
                changed.append(consumer.name)
        if added:
            connection.execute("select make_dispatch()")
        if fence and (added or changed):
            connection.execute("select take_lead('cdcbridge consumers apply')")
    left = sorted(known.keys() - {consumer.name for consumer in consumers})
    return Applied(tuple(added), tuple(changed), tuple(left))


def subscriptions(connection: Connection, consumers: Sequence[Consumer]) -> list[Subscription]:
    """The applied consumers of the file, for routing."""
    with store_errors():
        rows = connection.execute(
            "select id, name, mode, config from consumers where name = any (%s) order by id",
            ([consumer.name for consumer in consumers],),
        ).fetchall()
    return [subscription(*row) for row in rows]


def all_subscriptions(connection: Connection) -> list[Subscription]:
    """Every consumer of the store, in the file or not."""
    with store_errors():
        rows = connection.execute("select id, name, mode, config from consumers order by id").fetchall()
    return [subscription(*row) for row in rows]


def _add(connection: Connection, consumer: Consumer, config: dict[str, Any]) -> None:
    row = connection.execute(
        "select add_consumer(%s, %s, %s)", (consumer.name, consumer.mode, Jsonb(config))
    ).fetchone()
    if row and consumer.start == "earliest" and consumer.mode != "stream":
        fill(connection, subscription(row[0], consumer.name, consumer.mode, config))


# what the log holds, for a consumer with start: earliest

_LOG: Final = """
    select seq, topic, key, data::text, commit_lsn::text, ordinal, xid, octet_length(data::text),
           array(select (data -> 'record' -> c)::text
                 from unnest(%(key)s::text[]) with ordinality as k (c, n) order by n),
           (data -> 'op')::text = '"truncate"'
    from messages
    where strpos(topic, '.') > 0
      and (topic = any (%(tables)s) or split_part(topic, '.', 1) = any (%(schemas)s) or %(all)s)
      and (data -> 'op')::text = any (%(operations)s)
       or topic = any (%(topics)s) or topic = 'cdcbridge.gap'
    order by seq
"""


def fill(connection: Connection, wanted: Subscription) -> None:
    """Fan what the log holds into one consumer, and tell how far it is. Call in the transaction that makes it."""
    last = connection.execute("select last_value from messages_seq").fetchone()
    next_told = time.monotonic() + _TELL_EVERY
    schemas = [pattern[:-2] for pattern in wanted.tables if pattern.endswith(".*")]
    given = {
        "key": list(wanted.key or ()),
        "tables": list(wanted.tables),
        "topics": list(wanted.topics),
        "schemas": [schema for schema in schemas if schema != "*"],
        "all": "*" in schemas,
        "operations": [f'"{operation}"' for operation in sorted(wanted.operations)],
    }
    with connection.cursor(name="cdcbridge_fill") as reader:
        reader.execute(_LOG.encode(), given)
        while rows := reader.fetchmany(_PAGE):
            batch, dead = _sort(rows, wanted)
            with connection.cursor() as cursor, cursor.copy(COPY_WAITING) as copy:
                copy.write(COPY_HEADER + waiting_rows(batch, 0) + COPY_TRAILER)
            if barriers := barrier_rows(batch, 0):
                connection.execute("select insert_barriers(%s, %s)", tuple(map(list, zip(*barriers, strict=True))))
            if dead:
                connection.execute(
                    "select bury_appended(%s, %s, %s, %s)",
                    ([wanted.consumer_id] * len(dead), *(list(column) for column in zip(*dead, strict=True))),
                )
            if time.monotonic() >= next_told:
                log.info("consumer.filling", consumer=wanted.name, seq=rows[-1][0], of=last[0] if last else None)
                next_told += _TELL_EVERY


def _sort(rows: Sequence[tuple[Any, ...]], wanted: Subscription) -> tuple[Batch, list[tuple[int, str, str | None]]]:
    """Rows of the log → those that match, as a batch whose indexes are seqs; (seq, reason, key) of those that die."""
    seqs: list[int] = []
    keys: list[str | None] = []
    barriers: list[int] = []
    dead: list[tuple[int, str, str | None]] = []
    for row in rows:
        seq, size = row[0], row[7]
        key = _own_key(row[8]) if wanted.key else row[2]
        try:
            published = row[1] in wanted.topics or row[1] == GAP_TOPIC
            if wanted.filter is not None and not published and not _matches(wanted.filter, row):
                continue
        except FilterError as error:
            dead.append((seq, f"filter_error: {error}", key))
            continue
        if size > wanted.max_bytes:
            dead.append((seq, f"oversized: data has {size} bytes, max_message_bytes is {wanted.max_bytes}", key))
            continue
        seqs.append(seq)
        keys.append(key)
        if row[9]:
            barriers.append(seq)
    consumer = wanted.consumer_id
    batch = Batch(rows=[b""] * len(seqs), barriers=barriers)
    if wanted.in_order:
        batch.in_order = frozenset({consumer})
    if wanted.in_order or wanted.key:
        batch.keyed = {consumer: (seqs, keys)}
    else:
        batch.groups = {(consumer,): seqs}
    return batch, dead


def _matches(condition: Filter, row: tuple[Any, ...]) -> bool:
    _seq, topic, key, text, commit_lsn, ordinal, xid, *_ = row
    try:
        data = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise FilterError(f"a value that CEL cannot hold: {error.msg}") from error
    schema, _, table = topic.partition(".")
    meta = {"schema": schema, "table": table, "commit_lsn": commit_lsn, "ordinal": ordinal, "xid": xid}
    environment = {**data, "topic": topic, "key": key, "meta": meta}
    return condition.wants(environment, environment.pop("unchanged"))


def _own_key(values: Sequence[str | None]) -> str | None:
    """JSON texts of the key's columns → the key."""
    fragments = {
        str(n): orjson.loads(value) if value and value[0] in '"n' else value and orjson.Fragment(value)
        for n, value in enumerate(values)
    }
    return key_text(fragments, list(fragments))
