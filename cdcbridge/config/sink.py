"""Describe the `sink` of a consumer: the system to which cdcbridge delivers the consumer's messages.

Each type of sink has a model with its own keys. Secrets are SecretStr, so that they are never printed. This module
never contacts a sink: `cdcbridge.sinks` does.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from cdcbridge.config.sink_base import Model, SinkBase, Tls
from cdcbridge.routing.destination import Destination
from cdcbridge.units import Duration, Size
from cdcbridge.words import without_path, without_secrets


def _as_property(value: Any) -> Any:
    """Accept numbers and booleans as YAML has them, because librdkafka takes all properties as texts."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


_Property: TypeAlias = Annotated[
    SecretStr, BeforeValidator(_as_property), WithJsonSchema({"type": ["string", "number", "boolean"]})
]


def _template(value: str) -> str:
    Destination(value)
    return value


class NatsSink(SinkBase):
    """A stream of NATS JetStream."""

    type: Annotated[Literal["nats"], Field(description="The type of the sink. Required.", examples=["nats"])]
    servers: Annotated[
        tuple[str, ...],
        Field(min_length=1),
        Field(description="The servers of the NATS cluster.", examples=["[nats://nats1:4222, nats://nats2:4222]"]),
    ]
    stream: Annotated[
        str,
        Field(min_length=1),
        Field(description="The JetStream stream. It must exist and take the subjects.", examples=["SHOP"]),
    ]
    subject: Annotated[
        str,
        Field(min_length=1),
        Field(description="The subject of each message, with placeholders.", examples=["shop.{schema}.{table}"]),
    ]
    credentials: Annotated[
        SecretStr | None,
        Field(
            description="A token, `user:password`, or the path of a .creds file. Better from a variable.",
            examples=["${NATS_CREDENTIALS}"],
        ),
    ] = None
    tls: Annotated[Tls | None, Field(description="How the connection is encrypted.", examples=["{ca: ca.pem}"])] = None

    _subject = field_validator("subject")(_template)


class KafkaSink(SinkBase):
    """Topics of Kafka, or of a broker that speaks its protocol."""

    type: Annotated[Literal["kafka"], Field(description="The type of the sink. Required.", examples=["kafka"])]
    bootstrap_servers: Annotated[
        tuple[str, ...],
        Field(min_length=1),
        Field(description="Brokers of the cluster.", examples=["[broker1:9092, broker2:9092]"]),
    ]
    topic: Annotated[
        str,
        Field(min_length=1),
        Field(description="The topic of each message, with placeholders.", examples=["shop.{schema}.{table}"]),
    ]
    transactions: Annotated[
        bool,
        Field(
            description="With true, each batch is a transaction, so that readers with read_committed get each message "
            "once. With false, each message arrives at least once.",
            examples=["false"],
        ),
    ] = True
    producer: Annotated[
        dict[str, _Property],
        Field(
            description="Further properties of librdkafka's producer, for example for SASL.",
            examples=['{security.protocol: SASL_SSL, sasl.password: "${KAFKA_PASSWORD}"}'],
        ),
    ] = {}  # noqa: RUF012 - pydantic copies it

    _topic = field_validator("topic")(_template)


class RedisSink(SinkBase):
    """Streams of Redis or Valkey."""

    type: Annotated[Literal["redis"], Field(description="The type of the sink. Required.", examples=["redis"])]
    url: Annotated[
        SecretStr,
        Field(description="The server. Better from a variable.", examples=["rediss://user:password@redis:6380/0"]),
    ]
    stream: Annotated[
        str,
        Field(min_length=1),
        Field(
            description="The key of the Redis stream of each message, with placeholders.", examples=["shop:{partition}"]
        ),
    ]
    maxlen: Annotated[
        int | None,
        Field(ge=1),
        Field(
            description="Redis drops the oldest entries of a stream that is about this long. Without it, none.",
            examples=["1000000"],
        ),
    ] = None
    wait_replicas: Annotated[
        int,
        Field(ge=0, le=100),
        Field(description="A batch counts as delivered once so many replicas have it.", examples=["1"]),
    ] = 0
    tls: Annotated[Tls | None, Field(description="How the connection is encrypted.", examples=["{ca: ca.pem}"])] = None

    _stream = field_validator("stream")(_template)


class RabbitmqSink(SinkBase):
    """An exchange or a stream of RabbitMQ."""

    type: Annotated[Literal["rabbitmq"], Field(description="The type of the sink. Required.", examples=["rabbitmq"])]
    url: Annotated[
        SecretStr,
        Field(
            description="The server: amqp:// or amqps:// with an exchange, rabbitmq-stream:// or "
            "rabbitmq-stream+tls:// with a stream. Better from a variable.",
            examples=["amqps://user:password@rabbitmq:5671/vhost"],
        ),
    ]
    exchange: Annotated[
        str | None,
        Field(description="The exchange to which messages are published. An empty text is the default exchange."),
        Field(examples=["shop"]),
    ] = None
    routing_key: Annotated[
        str,
        Field(description="The routing key of each message, with placeholders.", examples=['"{schema}.{table}.{op}"']),
    ] = "{topic}"
    stream: Annotated[
        str | None,
        Field(description="The RabbitMQ stream, instead of an exchange. It must exist.", examples=["shop"]),
    ] = None
    tls: Annotated[Tls | None, Field(description="How the connection is encrypted.", examples=["{ca: ca.pem}"])] = None

    _routing_key = field_validator("routing_key")(_template)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.exchange is None) == (self.stream is None):
            raise ValueError("give either exchange or stream")
        return self


class SqsSink(SinkBase):
    """A queue of Amazon SQS, or of a server that speaks its protocol."""

    type: Annotated[Literal["sqs"], Field(description="The type of the sink. Required.", examples=["sqs"])]
    queue_url: Annotated[
        str,
        Field(min_length=1),
        Field(
            description="The queue. The name of a FIFO queue ends with .fifo.",
            examples=["https://sqs.eu-central-1.amazonaws.com/123456789012/shop.fifo"],
        ),
    ]
    endpoint_url: Annotated[
        str | None,
        Field(description="The server, if it is not Amazon's.", examples=["http://localhost:4566"]),
    ] = None
    region: Annotated[
        str | None,
        Field(description="The region. Without it, as AWS's environment says.", examples=["eu-central-1"]),
    ] = None


class HttpSink(SinkBase):
    """A webhook, which receives messages by POST requests as Standard Webhooks describes."""

    type: Annotated[Literal["http"], Field(description="The type of the sink. Required.", examples=["http"])]
    url: Annotated[
        SecretStr,
        Field(
            description="The address that receives a POST request for each message or batch, with placeholders.",
            examples=["https://example.com/hooks/{table}"],
        ),
    ]
    headers: Annotated[
        dict[str, SecretStr],
        Field(description="Further headers of each request.", examples=['{Authorization: "Bearer ${HOOK_TOKEN}"}']),
    ] = {}  # noqa: RUF012 - pydantic copies it
    secret: Annotated[
        SecretStr | None,
        Field(
            description="The secret that signs each request (Standard Webhooks), for example `whsec_…`.",
            examples=["${HOOK_SECRET}"],
        ),
    ] = None
    tls: Annotated[Tls | None, Field(description="How the connection is encrypted.", examples=["{ca: ca.pem}"])] = None

    @field_validator("url")
    @classmethod
    def _url(cls, value: SecretStr) -> SecretStr:
        Destination(value.get_secret_value(), without_path(value.get_secret_value()))
        if not value.get_secret_value().startswith(("http://", "https://")):
            raise ValueError("it must begin with http:// or https://")
        return value


class Rotate(Model):
    """When a file sink begins a new file."""

    size: Annotated[
        Size | None, Field(gt=0), Field(description="A file that is larger than this is renamed.", examples=["100MB"])
    ] = None
    interval: Annotated[
        Duration | None,
        Field(gt=0),
        Field(
            description="A file has the messages of one such interval of the clock, in UTC. With 1h, of one hour.",
            examples=["1h"],
        ),
    ] = None


class FileSink(SinkBase):
    """A file of JSON lines."""

    type: Annotated[Literal["file"], Field(description="The type of the sink. Required.", examples=["file"])]
    path: Annotated[
        str,
        Field(min_length=1),
        Field(
            description="The file, with placeholders. Its folder must exist.", examples=["/var/lib/shop/{topic}.jsonl"]
        ),
    ]
    rotate: Annotated[
        Rotate, Field(description="When a new file is begun. Without it, never.", examples=["{size: 100MB}"])
    ] = Rotate()

    _path = field_validator("path")(_template)


class CustomSink(SinkBase):
    """A target for which you have written an adapter (docs/SINKS.md)."""

    type: Annotated[Literal["custom"], Field(description="The type of the sink. Required.", examples=["custom"])]
    adapter: Annotated[
        str,
        Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"),
        Field(description="The module and the class of the adapter.", examples=["mqtt_sink:MqttTarget"]),
    ]
    destination: Annotated[
        str,
        Field(min_length=1),
        Field(description="The place of each message in the target, with placeholders.", examples=["shop/{table}"]),
    ]
    options: Annotated[
        dict[str, _Property],
        Field(description="Settings that the adapter reads.", examples=['{host: broker1, password: "${PASSWORD}"}']),
    ] = {}  # noqa: RUF012 - pydantic copies it

    _destination = field_validator("destination")(_template)


Sink: TypeAlias = Annotated[
    NatsSink | KafkaSink | RedisSink | RabbitmqSink | SqsSink | HttpSink | FileSink | CustomSink,
    Field(discriminator="type"),
]


def shown_destination(sink: SinkBase) -> str:
    """Return the template of the sink's destination for people, without secrets."""
    template = destination_of(sink)
    return without_path(template) if isinstance(sink, HttpSink) else without_secrets(template)


def destination_of(sink: SinkBase) -> str:
    """Return the template of the sink's destination, for example the topic of a Kafka sink."""
    match sink:
        case NatsSink():
            return sink.subject
        case KafkaSink():
            return sink.topic
        case RedisSink():
            return sink.stream
        case RabbitmqSink():
            return sink.stream if sink.stream is not None else sink.routing_key
        case SqsSink():
            return sink.queue_url
        case HttpSink():
            return sink.url.get_secret_value()
        case FileSink():
            return sink.path
        case CustomSink():
            return sink.destination
    raise TypeError(type(sink).__name__)
