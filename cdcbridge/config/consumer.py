"""Describe one consumer of the configuration file.

config/__init__.py describes the rest of the file. This module never accesses a file, the environment or a database.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cdcbridge.config.sink import Sink, destination_of, shown_destination
from cdcbridge.config.sink_base import Model, SinkBase
from cdcbridge.routing.annotations import ANNOTATE
from cdcbridge.routing.destination import Destination
from cdcbridge.routing.filters import Filter, refuse_on_leave
from cdcbridge.routing.patterns import refuse_bad_patterns
from cdcbridge.routing.router import OPERATIONS
from cdcbridge.units import Duration, Size

Operation = Literal["insert", "update", "delete", "truncate"]


class RetryDelay(Model):
    """The delay of a nack that names none: min(max, initial × factor^(deliver_count − 1))."""

    initial: Annotated[Duration, Field(description="The delay after the first delivery.", examples=["1s"])] = 1.0
    factor: Annotated[
        float,
        Field(ge=1, le=100),
        Field(description="The factor by which each delay is longer than the one before.", examples=["2"]),
    ] = 2.0
    max: Annotated[Duration, Field(description="No delay is longer than this.", examples=["10m"])] = 600.0


class Columns(Model):
    """Which columns receivers get: one of the two."""

    include: Annotated[
        tuple[str, ...] | None,
        Field(description="Receivers get these columns and no others.", examples=["[id, status]"]),
    ] = None
    exclude: Annotated[
        tuple[str, ...] | None, Field(description="Receivers get all columns but these.", examples=["[card_number]"])
    ] = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.include is None) == (self.exclude is None):
            raise ValueError("give either include or exclude")
        return self


class Consumer(Model):
    """One consumer: what it wants, and how it is delivered."""

    name: Annotated[
        str,
        Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$"),
        Field(
            description="The consumer's name, as commands and clients give it. Required. Write a-z, 0-9, _, . and -.",
            examples=["billing"],
        ),
    ]
    mode: Annotated[
        Literal["queue", "fifo", "stream"],
        Field(
            description="How messages are delivered. `queue`: to any receiver, in any order. `fifo`: in order for "
            "each key, and only one receiver has messages of a key at a time. `stream`: a group of readers shares the "
            "log, as in Kafka. With a sink, the default is `stream`.",
            examples=["fifo"],
        ),
    ] = "queue"
    tables: Annotated[
        tuple[str, ...],
        Field(
            description="The tables whose changes the consumer takes. A `*` matches any part of a name, and `!` leaves "
            "tables out.",
            examples=['[public.orders, "sales.*", "!sales.tmp_*"]'],
        ),
    ] = ()
    topics: Annotated[
        tuple[str, ...],
        Field(
            description="The topics of published messages that the consumer takes. A topic has no dot.",
            examples=["[invoices]"],
        ),
    ] = ()
    operations: Annotated[
        tuple[Operation, ...],
        Field(description="The kinds of changes that the consumer takes.", examples=["[insert, update]"]),
    ] = OPERATIONS
    filter: Annotated[
        str | None,
        Field(
            description="A CEL expression over op, topic, key, record, old and meta. Only changes for which it is "
            "true are delivered.",
            examples=["\"record.status == 'paid'\""],
        ),
    ] = None
    on_leave: Annotated[
        Literal["none", "delete"],
        Field(
            description="With `delete`, a row that no longer matches the filter is delivered once more, as a delete.",
            examples=["delete"],
        ),
    ] = "none"
    columns: Annotated[
        Columns | None,
        Field(
            description="Which columns receivers get. Without it, all of them.", examples=["{exclude: [card_number]}"]
        ),
    ] = None
    key: Annotated[
        tuple[str, ...] | None,
        Field(
            description="The columns of the message's key, which orders `fifo`. Without it, the primary key. The "
            "table's replica identity must cover them.",
            examples=["[customer_id]"],
        ),
    ] = None
    start: Annotated[
        Literal["now", "earliest", "snapshot"],
        Field(
            description="The place where a new consumer begins. `now`: with the next change. `earliest`: with the "
            "oldest message of the log. `snapshot`: with the rows that are in the tables.",
            examples=["snapshot"],
        ),
    ] = "now"
    visibility_timeout: Annotated[
        Duration,
        Field(gt=0),
        Field(
            description="A message that was received and not acked is visible again after this time.", examples=["30s"]
        ),
    ] = 30.0
    max_deliveries: Annotated[
        int,
        Field(ge=1, le=10_000),
        Field(
            description="After this number of deliveries without an ack, a message becomes a dead letter.",
            examples=["5"],
        ),
    ] = 5
    retry_delay: Annotated[
        RetryDelay,
        Field(
            description="How long a message waits after a nack that gives no delay: min(max, initial × "
            "factor^(deliveries − 1)).",
            examples=["{initial: 1s, factor: 2, max: 10m}"],
        ),
    ] = RetryDelay()
    max_in_flight: Annotated[
        int,
        Field(ge=1, le=1_000_000),
        Field(
            description="The largest number of messages that are received and not yet acked at one time.",
            examples=["1000"],
        ),
    ] = 1000
    max_message_bytes: Annotated[
        Size, Field(description="A larger message becomes a dead letter at once.", examples=["1MB"])
    ] = 1 << 20
    role: Annotated[
        Annotated[str, Field(min_length=1, max_length=63)] | None,
        Field(
            description="The database role that alone may read the consumer. Without it, only the store's owner.",
            examples=["billing_app"],
        ),
    ] = None
    compact: Annotated[
        bool,
        Field(
            description="With true, the log keeps only the newest message of each key for this consumer. For "
            "`stream` only.",
            examples=["true"],
        ),
    ] = False
    sink: Annotated[
        Sink | None,
        Field(
            description="The system to which cdcbridge delivers the messages. Without it, applications receive them.",
            examples=["{type: file, path: /var/lib/shop/orders.jsonl}"],
        ),
    ] = None

    @property
    def needed_sink(self) -> SinkBase:
        """The sink. Raises ValueError if the consumer has none."""
        if self.sink is None:
            raise ValueError(f"consumer {self.name!r} has no sink")
        return self.sink

    @model_validator(mode="before")
    @classmethod
    def _a_sink_is_a_stream(cls, values: Any) -> Any:
        """Make stream the default mode of a consumer with a sink."""
        if isinstance(values, dict) and values.get("sink") is not None and "mode" not in values:
            return {**values, "mode": "stream"}
        return values

    @field_validator("tables")
    @classmethod
    def _table_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        refuse_bad_patterns(value)
        return value

    @field_validator("topics")
    @classmethod
    def _published_topics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for topic in value:
            if not topic or "." in topic:
                raise ValueError(f"{topic!r} is not a topic: a published topic has a name without a dot")
            if topic == ANNOTATE:
                raise ValueError(
                    f"{topic!r} is reserved: such a message in the WAL annotates the changes after it, and is not"
                    " published"
                )
        return value

    @field_validator("operations", "key")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not value:
            raise ValueError("must not be empty")
        return value

    @field_validator("filter")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                Filter(value)
            except ValueError as error:
                raise ValueError(f"not a CEL expression: {str(error).splitlines()[0]}") from None
        return value

    @model_validator(mode="after")
    def _wants_something(self) -> Self:
        if not (self.tables or self.topics):
            raise ValueError("a consumer needs tables or topics")
        if self.start == "snapshot" and not self.tables:
            raise ValueError(
                "start: snapshot reads tables, and the consumer has none. For published topics use start: earliest"
            )
        return self

    @model_validator(mode="after")
    def _reads_the_log_as_it_is(self) -> Self:
        given = [name for name in ("filter", "columns", "key") if getattr(self, name) is not None]
        if self.mode == "stream" and given and self.sink is None:
            raise ValueError(f"a stream reads the log as it is: {' and '.join(given)} cannot be given")
        return self

    @model_validator(mode="after")
    def _knows_when_a_row_leaves(self) -> Self:
        if self.on_leave == "delete":
            refuse_on_leave(self.mode, self.filter, self.operations)
        return self

    @model_validator(mode="after")
    def _published_messages_have_a_destination(self) -> Self:
        if self.sink is not None and self.topics and Destination(destination_of(self.sink)).of_tables:
            raise ValueError(
                f"published messages have no schema and no table, which {shown_destination(self.sink)!r} needs; "
                "write {topic}, or give the topics to another consumer"
            )
        return self

    @model_validator(mode="after")
    def _compacts_a_state(self) -> Self:
        if self.compact and self.mode != "stream":
            raise ValueError(
                f"compact works only in mode stream, which reads the log. A {self.mode} gets each message once"
            )
        if self.compact and set(self.operations) != set(OPERATIONS):
            raise ValueError(f"compact keeps a table's state, which needs all operations: {', '.join(OPERATIONS)}")
        return self
