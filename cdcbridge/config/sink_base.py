"""Describe the keys that all types of sinks have: the form of messages, batches, and what happens after a failure.

`sink.py` describes each type. This module never contacts a sink.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from cdcbridge.routing.transform import Transform
from cdcbridge.units import Duration, Size

# YAML reads null as no value, and means the way to hide by it.
Mask = dict[
    str, Annotated[Literal["hash", "null", "last4"], BeforeValidator(lambda how: "null" if how is None else how)]
]


class Model(BaseModel):
    """A mapping in the configuration file, which refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SinkBatch(Model):
    """How many messages one delivery may have."""

    max_messages: Annotated[
        int, Field(ge=1, le=10_000), Field(description="A batch has at most so many messages.", examples=["500"])
    ] = 500
    max_bytes: Annotated[
        Size,
        Field(gt=0),
        Field(description="A batch ends with the message that makes it larger than this.", examples=["1MB"]),
    ] = 1 << 20
    linger: Annotated[
        Duration,
        Field(le=10),
        Field(description="A batch that is not full waits so long for more messages.", examples=["5ms"]),
    ] = 0.005


class Tls(Model):
    """The encryption of a sink's connection, and the certificates of both ends."""

    ca: Annotated[
        Path | None,
        Field(
            description="A file with the certificates of the authorities that are trusted. Without it, the system's.",
            examples=["/etc/ssl/broker-ca.pem"],
        ),
    ] = None
    cert: Annotated[
        Path | None,
        Field(description="A file with the client's certificate.", examples=["/etc/cdcbridge/client.pem"]),
    ] = None
    key: Annotated[
        Path | None, Field(description="A file with the client's key.", examples=["/etc/cdcbridge/client.key"])
    ] = None

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key are given together")
        return self


class SinkBase(Model):
    """The keys that all types of sinks have."""

    type: str
    format: Annotated[
        Literal["cdcbridge", "debezium", "cloudevents"],
        Field(
            description="The form of each message. `cdcbridge`: the message as the log has it. `debezium`: Debezium's "
            "envelope with before, after, op and source. `cloudevents`: CloudEvents 1.0.",
            examples=["debezium"],
        ),
    ] = "cdcbridge"
    content_mode: Annotated[
        Literal["structured", "binary"],
        Field(
            description="For `format: cloudevents`. `structured`: one JSON document. `binary`: the attributes are "
            "headers, and the body has the data alone.",
            examples=["binary"],
        ),
    ] = "structured"
    transform: Annotated[
        str | None,
        Field(
            description="A CEL expression that gives a map, which is delivered instead of the message. It reads op, "
            "topic, key, record, old and meta.",
            examples=["\"{'id': record.id, 'total': record.price * record.quantity}\""],
        ),
    ] = None
    mask: Annotated[
        Mask,
        Field(
            description="Columns whose values are hidden, in every table that has them. `hash`: the first 32 "
            "characters of their SHA-256. `null`: null. `last4`: the last four characters.",
            examples=["{email: hash, phone: last4}"],
        ),
    ] = {}
    batch: Annotated[
        SinkBatch | None,
        Field(
            description="How many messages one delivery may have. A webhook gets one message in each request, or with "
            "`batch` a JSON array of messages.",
            examples=["{max_messages: 1000}"],
        ),
    ] = None
    on_failure: Annotated[
        Literal["block", "dead_letter"],
        Field(
            description="What happens to a message that the sink refuses for good. `block`: it is tried again, and "
            "the later messages of its partition (stream) or key (fifo) wait. `dead_letter`: it becomes a dead letter.",
            examples=["dead_letter"],
        ),
    ] = "block"
    rate: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Field(
            description="At most so many messages are delivered in a second, by all processes together. Without it, as "
            "many as possible."
        ),
        Field(examples=["100"]),
    ] = None
    timeout: Annotated[
        Duration,
        Field(gt=0),
        Field(
            description="A delivery that the sink has not answered after this time is tried again.", examples=["30s"]
        ),
    ] = 30.0

    @property
    def batching(self) -> SinkBatch:
        """The limits of a batch, with their defaults."""
        return self.batch or SinkBatch()

    @field_validator("transform")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                Transform(value)
            except ValueError as error:
                raise ValueError(f"not a CEL expression: {str(error).splitlines()[0]}") from None
        return value
