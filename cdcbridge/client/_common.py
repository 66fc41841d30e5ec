"""Messages, deliveries, SQL statements and waiting times that all clients share.

This module is pure: it never opens or uses a session.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple, TypeVar, cast

from psycopg import sql

from cdcbridge.client._contents import ParseFloat, parsed
from cdcbridge.client._limits import now, refuse_bad_time
from cdcbridge.errors import ClientClosed, UnreadableData, UsageError

LONGEST_WAIT: Final = 10.0  # seconds between looks, in case a notification is lost
POOLED_INTERVAL: Final = 1.0  # seconds between looks through a pooler, where no notifications arrive


class LogMessage:
    """A message of the log.

    Attributes:
        seq: Number of the message in the log.
        topic: Name of the table, for example `public.orders`, or of the topic under which the message was published.
        key: Key of the row or of the published message, or None.
        raw: The data as JSON text, with numbers as PostgreSQL wrote them.
        position: Pair (commit_lsn, ordinal), or None for a published message.
        commit_time: Time of the commit on the source, or None.
        inserted_at: Time at which the message was added to the log.
        parse_float: Function that makes the numbers of `data` that are not integers, or None.
    """

    __slots__ = ("_data", "commit_time", "inserted_at", "key", "parse_float", "position", "raw", "seq", "topic")

    def __init__(
        self,
        seq: int,
        topic: str,
        key: str | None,
        raw: str,
        position: tuple[str, int] | None,
        commit_time: datetime | None,
        inserted_at: datetime,
    ) -> None:
        self.seq = seq
        self.topic = topic
        self.key = key
        self.raw = raw
        self._data: dict[str, Any] | None = None
        self.parse_float: ParseFloat | None = None
        self.position = position
        self.commit_time = commit_time
        self.inserted_at = inserted_at

    @property
    def data(self) -> dict[str, Any]:
        """The data as a dict with "op", "record", "old" and "unchanged", made from `raw` at the first use.

        A json column can hold text that orjson refuses, such as half of a surrogate pair. Python's own parser accepts
        it. With `parse_float` of connect(), every number keeps all of its digits.

        Raises:
            UnreadableData: Python has no values for the JSON, for example for 5,000 nested lists. This is also a
                ValueError.
        """
        if self._data is None:
            self._data = _parsed(self)
        return self._data

    def __repr__(self) -> str:
        return f"<{type(self).__name__} seq={self.seq} topic={self.topic!r} key={self.key!r}>"


def _parsed(message: LogMessage) -> dict[str, Any]:
    try:
        found = parsed(message.raw, message.parse_float)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise UnreadableData(
            f"message {message.seq} of {message.topic}: its data cannot be converted to Python values: {error}",
            hint="`raw` has it as JSON text.",
        ) from None
    return cast("dict[str, Any]", found)


class Delivery(LogMessage):
    """A message as it was delivered to a receiver. The class Message documents its public attributes.

    Attributes:
        visibility: Seconds that were left of the lease when the server sent the delivery.
        ends: End of the lease on the clock of now(), in seconds.
        xid: Transaction of an ack that the caller commits, or None.
        mates: Messages of the same key that arrived in the same batch, in order.
    """

    __slots__ = (
        "_ends",
        "_mates",
        "_visibility",
        "_xid",
        "deliver_count",
        "lost",
        "not_visible_until",
        "receipt",
        "settled",
    )

    def __init__(
        self,
        receipt: str,
        seq: int,
        topic: str,
        key: str | None,
        raw: str,
        deliver_count: int,
        not_visible_until: datetime,
        position: tuple[str, int] | None,
        commit_time: datetime | None,
        inserted_at: datetime,
        visibility: float,
        asked: float,
    ) -> None:
        super().__init__(seq, topic, key, raw, position, commit_time, inserted_at)
        self.receipt = receipt
        self.deliver_count = deliver_count
        self.not_visible_until = not_visible_until
        self._visibility = visibility
        self.settled: Literal["acked", "nacked", "given back"] | None = None
        self.lost = False
        self._xid: str | None = None
        self._mates: Sequence[Delivery] = ()
        # Counted from the request, because a process that was stopped reads the answer late.
        self._ends = asked + visibility

    @property
    def _half_over(self) -> bool:
        """True if less than half of the visibility timeout is left."""
        return now() > self._ends - self._visibility / 2

    @property
    def _idle(self) -> bool:
        """True if the lease need not be extended: the message is settled, or the lease is lost."""
        return self.lost or self.settled is not None

    def _prolonged(self, asked: float, seconds: float) -> None:
        """Note a new end of the lease: `seconds` after the request, which was sent at the time `asked`."""
        self._ends = asked + seconds


D = TypeVar("D", bound=Delivery)


def row_delivery(row: tuple[Any, ...], asked: float) -> tuple[Any, ...]:
    """Return the arguments of a Delivery for a row of the receive statement that was sent at the time `asked`."""
    *head, commit_lsn, ordinal, commit_time, inserted_at, visibility = row
    position = None if commit_lsn is None else (commit_lsn, ordinal)
    return (*head, position, commit_time, inserted_at, visibility, asked)


def row_message(row: tuple[Any, ...], parse_float: ParseFloat | None) -> LogMessage:
    """Return the message in a row of the read statement, given from the column seq on."""
    seq, topic, key, raw, commit_lsn, ordinal, commit_time, inserted_at = row
    position = None if commit_lsn is None else (commit_lsn, ordinal)
    message = LogMessage(seq, topic, key, raw, position, commit_time, inserted_at)
    message.parse_float = parse_float
    return message


def due_in(row: tuple[Any, ...] | None, poll_interval: float | None) -> float:
    """Return the seconds to wait before the next look for messages.

    Args:
        row: Row of next_visible() or next_readable(): seconds until a message may be visible, or None if none is known.
        poll_interval: Longest wait in seconds. None means that the client listens for notifications.
    """
    longest = LONGEST_WAIT if poll_interval is None else poll_interval
    due = row[0] if row else None
    return longest if due is None else min(longest, max(0.001, due))


def by_key(messages: Sequence[D]) -> list[list[D]]:
    """Return the messages as jobs, each of which is handled in order.

    The messages of one key form a job. Each message without a key is a job of its own.
    """
    jobs: dict[object, list[D]] = {}
    for message in messages:
        jobs.setdefault(message.receipt if message.key is None else (message.key,), []).append(message)
    return list(jobs.values())


def tie_mates(messages: Iterable[Delivery]) -> None:
    """Connect the messages of each key that arrived in one batch."""
    keys: dict[str, list[Delivery]] = {}
    for message in messages:
        if message.key is not None:
            message._mates = keys.setdefault(message.key, [])
            keys[message.key].append(message)


def behind(message: Delivery) -> list[Delivery]:
    """Return the later messages of the same key in the same batch that are neither settled nor lost."""
    if not message._mates:
        return []
    place = message._mates.index(message) + 1
    return [mate for mate in message._mates[place:] if not mate._idle]


class Statements:
    """SQL statements that call the functions of a store's schema.

    `settings` returns the id and the mode of the consumer. `next_due` returns the seconds until the next look.
    """

    settings: sql.Composed
    next_due: sql.Composed

    def __init__(self, schema: str) -> None:
        self._schema = schema
        self.listen = self._statement("listen {schema}")

    def _statement(self, text: str) -> sql.Composed:
        return sql.SQL(text).format(schema=sql.Identifier(self._schema))


class Seq(int):
    """The seq of a published message: an int with one more attribute.

    Attributes:
        duplicate: True if a message with this `dedup_id` existed before, so that nothing was added. None if that is not
            known, because the session was lost during a first attempt that may have added the message.
    """

    duplicate: bool | None

    @classmethod
    def _of(cls, row: tuple[Any, ...] | None, *, once: bool, attempts: int = 1) -> Seq:
        """Make a Seq from the row of the publish statement, which was sent `attempts` times.

        `once` is true for a message with a `dedup_id`. Without one there are no duplicates.
        """
        seq, told = row or (0, None)
        made = cls(seq)
        made.duplicate = once and told == "on"
        if made.duplicate and attempts > 1:
            made.duplicate = None
        return made


class QueueStatements(Statements):
    """SQL statements of a queue client."""

    def __init__(self, schema: str) -> None:
        super().__init__(schema)
        statement = self._statement
        self.receive = statement(
            "select r.receipt, r.seq, r.topic, r.key, r.data::text, r.deliver_count, r.not_visible_until,"
            " r.commit_lsn::text, r.ordinal, r.commit_time, r.inserted_at,"
            " extract(epoch from r.not_visible_until - clock_timestamp())::float8"
            " from {schema}.receive(%s, %s, make_interval(secs => %s), durable => false) r"
        )
        self.ack = statement("select {schema}.ack(%s, %s, false)")
        self.ack_strictly = statement("select {schema}.ack(%s, %s, true), pg_catalog.pg_current_xact_id()::text")
        self.give_back = statement("select {schema}.give_back(%s, %s)")
        # The outcome of an ack in the caller's transaction. 0: the message is finished. 1: the ack was rolled back,
        # perhaps to a savepoint. -1: the transaction is open. extend() would wait for it, so it is not called then.
        self.outcome = statement(
            "select case pg_xact_status(%s::text::xid8) when 'committed'"
            " then {schema}.extend(%s, %s, make_interval(secs => %s)) when 'aborted' then 1 else -1 end"
        )
        self.nack = statement("select {schema}.nack(%s, %s, make_interval(secs => %s), %s, %s)")
        self.extend = statement("select {schema}.extend(%s, %s, make_interval(secs => %s))")
        self.nack_failed = statement("select * from {schema}.nack_failed(%s, %s, %s)")
        # publish() is called in FROM, so that the setting is read after the call.
        self.publish = statement(
            "select p.seq, current_setting('cdcbridge.duplicate', true) from {schema}.publish(%s, %s, %s::json,"
            " %s::timestamptz, %s, make_interval(secs => %s)) p (seq)"
        )
        self.next_due = statement("select {schema}.next_visible(%s)")
        self.settings = statement("select id, mode from {schema}.queue_settings(%s)")


class StreamStatements(Statements):
    """SQL statements of a stream client."""

    def __init__(self, schema: str) -> None:
        super().__init__(schema)
        statement = self._statement
        self.read = statement(
            "select r.receipt, r.partition, r.seq, r.topic, r.key, r.data::text, r.commit_lsn::text, r.ordinal,"
            " r.commit_time, r.inserted_at from {schema}.read_stream(%s, %s, make_interval(secs => %s)) r"
        )
        self.commit = statement("select {schema}.commit_offset(%s, %s, %s, %s)")
        self.extend = statement("select {schema}.extend_lease(%s, %s, %s, make_interval(secs => %s))")
        self.seek = statement("select {schema}.seek(%s, %s, %s)")
        self.offset = statement("select seq from {schema}.group_lag(%s) where partition = %s")
        self.lag = statement("select partition, seq, messages, seconds from {schema}.group_lag(%s)")
        self.next_due = statement("select {schema}.next_readable(%s)")
        self.settings = statement("select id, 'stream' from {schema}.stream_settings(%s)")


class Standing(NamedTuple):
    """The progress of a group in one partition.

    Attributes:
        partition: Number of the partition.
        seq: Offset of the group: all messages up to this seq are done.
        messages: Number of messages after the offset that the group has yet to read.
        seconds: Age of the oldest of these messages in seconds, or None if there is none.
    """

    partition: int
    seq: int
    messages: int
    seconds: float | None


class Base:
    """Settings of a client, and the facts that it learned about its consumer."""

    def __init__(self, dsn: str, consumer: str, poll_interval: float | None) -> None:
        refuse_bad_time("poll_interval", poll_interval, zero=False)
        self._dsn = dsn
        self.consumer = consumer
        self.poll_interval = poll_interval
        self._parse_float: ParseFloat | None = None
        self._pooled = False
        self.stopped = False
        self.closed = False
        self.mode = ""
        self._id = 0
        self._newest_id = 0
        self._process = os.getpid()

    def stop(self) -> None:
        """End the loops and workers of this client after the message or batch in progress.

        A loop is one over messages() or, of a stream, over batches(). A call that waits for messages returns early.
        stop() is safe in a signal handler and from another thread.
        """
        self.stopped = True

    def _refuse_unusable(self) -> None:
        """Raise ClientClosed after close(), and UsageError in another process than the one that connected."""
        if self.closed:
            raise ClientClosed(f"the client of {self.consumer!r} is closed", hint="connect() opens a new one.")
        if self._forked:
            raise UsageError(
                f"the client of {self.consumer!r} belongs to process {self._process}, and this is {os.getpid()}",
                hint="A process that was forked shares its parent's sessions. Call connect() in each process.",
            )

    @property
    def _forked(self) -> bool:
        """True if this process is a child of the one that connected."""
        return os.getpid() != self._process

    def _note_consumer(self, row: tuple[Any, ...] | None) -> None:
        """Store the consumer's id and mode from a row of `settings`, and poll if there is a connection pooler."""
        if row is not None:
            self._id, self.mode = row
            self._newest_id = max(self._newest_id, self._id)
        if self._pooled and self.poll_interval is None:
            self.poll_interval = POOLED_INTERVAL

    def _concerns(self, payload: str) -> bool:
        """Return whether a notification concerns this consumer.

        The payload lists the ids of the consumers with new messages, for example "3,17", or is empty if they are many.
        """
        return not payload or str(self._id) in payload.split(",")

    def _meets_new(self, payloads: list[str]) -> bool:
        """Return whether a notification names a consumer id that is newer than all known ones.

        The client's own consumer may have been removed and created again. Then its id has to be read again.
        """
        names = [one for payload in payloads for one in payload.split(",")]
        newest = max((int(one) for one in names if one.isdecimal()), default=0)
        if newest <= self._newest_id:
            return False
        self._newest_id = newest
        return True
