"""Fan out messages of the log to one consumer: a new one with `start: earliest`, or one that replays.

Messages are matched and filtered as the collector does it, so that a message is the same whenever it is fanned out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

import orjson
import structlog

from cdcbridge.changes.keys import key_text
from cdcbridge.database import Connection
from cdcbridge.database.patience import patiently
from cdcbridge.instants import reach
from cdcbridge.routing.batch import AppendBatch
from cdcbridge.routing.copy_format import COPY_HEADER, COPY_TRAILER, COPY_WAITING
from cdcbridge.routing.fan_out import barrier_rows, waiting_rows
from cdcbridge.routing.judged import Logged
from cdcbridge.routing.patterns import left_out, like, taken
from cdcbridge.routing.subscription import Subscription
from cdcbridge.routing.verdict import Bury, Pass, verdict

_PAGE: Final = 5000  # messages of the log that are read at a time
_TELL_EVERY: Final = 2.0  # seconds between two log lines about a long filling
_END: Final = (1 << 63) - 1
_NONE: Final = frozenset[str]()
_Dead: TypeAlias = tuple[int, str, str | None]
log = structlog.get_logger()

_LOG: Final = """
    select seq, topic, key, data::text, commit_lsn::text, ordinal, xid, octet_length(data::text),
           record_values(data, %(key)s::text[]), op_of(data) = 'truncate', old_key
    from messages
    where seq between %(low)s and %(high)s
      and (strpos(topic, '.') > 0
           and topic like any (%(tables)s) and not topic like any (%(left_out)s)
           and (op_of(data) = any (%(operations)s) or reader = %(consumer)s)
           or topic = any (%(topics)s) or topic = 'cdcbridge.gap' and (reader is null or reader = %(consumer)s))
    order by seq"""


class Filling:
    """The fan-out of the log to one new consumer.

    Most of it happens while the bridge appends, and the rest while the fence keeps the bridge from appending. Call the
    methods in the transaction that makes the consumer.
    """

    def __init__(self, wanted: Subscription) -> None:
        self.wanted = wanted
        self._reached = -1  # all messages up to this seq are fanned out, and no others can appear there

    def fill(self, connection: Connection) -> None:
        """Fan out all messages up to the greatest seq below which no open transaction can still add any."""
        high = self._settled(connection)
        if high > self._reached:
            self._fill(connection, high)
            self._reached = high

    def behind(self, connection: Connection) -> int:
        """Return the number of seqs in the log that are left."""
        return max(0, _last_seq(connection) - self._reached)

    def finish(self, connection: Connection) -> None:
        """Fan out the rest, at a time when no session can append or publish messages that the consumer takes."""
        self._fill(connection, _END)

    def _settled(self, connection: Connection) -> int:
        if self.wanted.topics:
            row = connection.execute("select max_safe_seq()").fetchone()  # before the log is read
            return row[0] if row else 0
        # Open transactions of publishers do not matter: only the bridge writes messages that this consumer takes.
        with connection.transaction(force_rollback=True):
            connection.execute("set local lock_timeout = '60s'")
            connection.execute("select pg_advisory_xact_lock(fence_key())")
            return _last_seq(connection)

    def _fill(self, connection: Connection, high: int) -> None:
        consumer_id = self.wanted.consumer_id
        for batch, dead in _pages(connection, self.wanted, self._reached + 1, high):
            with connection.cursor() as cursor, cursor.copy(COPY_WAITING) as copy:
                copy.write(COPY_HEADER + waiting_rows(batch, 0) + COPY_TRAILER)
            keep_own(connection, batch.own)
            if barriers := barrier_rows(batch, 0):
                connection.execute("select insert_barriers(%s, %s)", tuple(map(list, zip(*barriers, strict=True))))
            if dead:
                connection.execute(
                    "select bury_appended(%s, %s, %s, %s)",
                    ([consumer_id] * len(dead), *(list(column) for column in zip(*dead, strict=True))),
                )


def _last_seq(connection: Connection) -> int:
    row = connection.execute("select coalesce(pg_sequence_last_value('messages_seq'), 0)").fetchone()
    return row[0] if row else 0


def replay(connection: Connection, reader: Connection, wanted: Subscription, low: int, high: int) -> tuple[int, int]:
    """Append messages of the log, from seq `low` to `high`, to the consumer's queue again.

    Each page is a commit of its own. Messages that do not match any more, or that would be dead letters at once, are
    skipped and not counted.

    Args:
        connection: A session on the store, in autocommit mode, which writes.
        reader: A session on the store, in a transaction, which reads the log.
        wanted: The consumer's subscription.
        low: The first seq.
        high: The last seq.

    Returns:
        The number of messages that were appended, and the number that were skipped because they wait or are in flight.
    """
    replayed = skipped = 0
    for batch, _dead in _pages(reader, wanted, low, high):
        seqs, keys = batch.keyed[wanted.consumer_id] if batch.keyed else (next(iter(batch.groups.values()), []), None)
        own = [(seq, data.decode()) for _, seq, _, data in batch.own]
        page = (wanted.consumer_id, seqs, keys, [seq for seq, _ in own], [data for _, data in own])
        row = patiently(
            connection,
            lambda page=page: connection.execute(  # type: ignore[misc]
                "select replayed, skipped from replay_messages(%s, %s, %s, %s, %s)", page
            ).fetchone(),
            what=f"consumers replay {wanted.name}",
        )
        replayed, skipped = replayed + (row[0] if row else 0), skipped + (row[1] if row else 0)
    return replayed, skipped


def _pages(
    connection: Connection, wanted: Subscription, low: int, high: int
) -> Iterator[tuple[AppendBatch, list[_Dead]]]:
    """Read the messages with these seqs that match, some thousands at a time, and sort them by verdict.

    Each page has a batch, whose indexes are seqs, and (seq, reason, key) of each dead letter.
    """
    last = connection.execute("select last_value from messages_seq").fetchone()
    identities = identities_of(connection) if wanted.on_leave else {}
    next_told = time.monotonic() + _TELL_EVERY
    given = {"low": low, "high": high, **_given(wanted)}
    with connection.cursor(name="cdcbridge_fill") as reader:
        reader.execute(_LOG.encode(), given)
        while rows := reader.fetchmany(_PAGE):
            yield _sort(rows, wanted, identities)
            reach("log page filled in")
            if time.monotonic() >= next_told:
                log.info("consumer.filling", consumer=wanted.name, seq=rows[-1][0], of=last[0] if last else None)
                next_told += _TELL_EVERY


def latest(connection: Connection, wanted: Subscription, last: int, low: int = 0) -> list[tuple[Any, ...]]:
    """Return the latest messages of the log that a subscription matches before its filter, the oldest first.

    The rows are for logged().

    Args:
        connection: A session on the store.
        wanted: The subscription.
        last: The most messages.
        low: Messages up to this seq are not looked at.
    """
    given = {"low": low, "high": _END, "last": last, **_given(wanted)}
    return connection.execute(f"{_LOG} desc limit %(last)s".encode(), given).fetchall()[::-1]


def logged(row: Sequence[Any], identities: dict[str, frozenset[str]]) -> Logged:
    """Return a row of the log in the form that verdict() takes.

    `identities` is the result of identities_of().
    """
    _, topic, key, text, commit_lsn, ordinal, xid, size, its_key, _, old_key = row
    identity = identities.get(topic, _NONE)
    return Logged(text, topic, key, commit_lsn, ordinal, xid, old_key, _own_key(its_key), identity, size)


def _given(wanted: Subscription) -> dict[str, Any]:
    """Return the parameters of the log's query for a subscription."""
    return {
        "consumer": wanted.consumer_id,  # rows of its own backfills; rows of others' backfills are for those consumers
        "key": list(wanted.key or ()),
        "tables": [like(pattern) for pattern in taken(wanted.tables)],
        "left_out": [like(pattern) for pattern in left_out(wanted.tables)],
        "topics": list(wanted.topics),
        "operations": sorted(wanted.operations),
    }


def identities_of(connection: Connection) -> dict[str, frozenset[str]]:
    """Return the columns of each captured topic's replica identity, as the bridge last knew them."""
    row = connection.execute("select catalog from source").fetchone()
    found: dict[str, frozenset[str]] = {}
    for name, entry in (row[0] if row else {}).items():
        topic = entry.get("topic")
        its_own = name.replace("/", ".", 1) == topic  # the table's own entry, and not a partition's
        if topic is not None and (its_own or topic not in found):
            found[topic] = frozenset(entry["identity"])
    return found


def keep_own(connection: Connection, own: Sequence[tuple[int, int, str | None, bytes]], first: int = 0) -> None:
    """Store data that replaces the log's data for a consumer, for example the delete of a row that left its filter.

    Args:
        connection: A session on the store.
        own: The consumer's id, index, key and data of each message.
        first: The seq of index 0.
    """
    if own:
        consumers, indexes, keys, data = zip(*own, strict=True)
        given = (list(consumers), [first + index for index in indexes], list(keys), [text.decode() for text in data])
        connection.execute("select keep_own(%s, %s, %s, %s)", given)


def _sort(
    rows: Sequence[tuple[Any, ...]], wanted: Subscription, identities: dict[str, frozenset[str]]
) -> tuple[AppendBatch, list[_Dead]]:
    """Sort rows of the log by verdict.

    The result is a batch of the messages that the consumer takes, and (seq, reason, key) of each dead letter. The
    indexes in the batch are seqs.
    """
    seqs: list[int] = []
    keys: list[str | None] = []
    barriers: list[int] = []
    dead: list[_Dead] = []
    consumer = wanted.consumer_id
    batch = AppendBatch(barriers=barriers)
    for row in rows:
        seq = row[0]
        said = verdict(wanted, logged(row, identities))
        if isinstance(said, Pass):
            continue
        if said.data is not None:
            batch.own.append((consumer, seq, said.key, said.data))
        if isinstance(said, Bury):
            dead.append((seq, said.reason, said.key))
            continue
        seqs.append(seq)
        keys.append(said.key)
        if row[9]:
            barriers.append(seq)
    batch.rows = [b""] * len(seqs)
    if wanted.in_order:
        batch.in_order = frozenset({consumer})
    if wanted.in_order or wanted.own_keys:
        batch.keyed = {consumer: (seqs, keys)}
    else:
        batch.groups = {(consumer,): seqs}
    return batch, dead


def _own_key(values: Sequence[str | None]) -> str | None:
    """Return the key that the JSON texts of the key's columns make, or None without columns."""
    if not values:
        return None
    fragments = {str(n): value and orjson.Fragment(value) for n, value in enumerate(values)}
    return key_text(fragments, list(fragments))
