"""Properties of librdkafka for a Kafka sink, and the meaning of its errors. Never contacts a broker.

The properties are listed at https://docs.confluent.io/platform/current/clients/librdkafka/html/md_CONFIGURATION.html.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition

from cdcbridge.config.sink import KafkaSink
from cdcbridge.sinks.target import Displaced, Failure, Outgoing, TargetAway, Unusable

HINT: Final = "correct the properties of the connection in sink.producer, for example sasl.password"
_RESERVED: Final = {"acks", "bootstrap.servers", "enable.idempotence", "metadata.broker.list", "request.required.acks",
                    "transactional.id"}  # fmt: skip
_OF_CONNECTIONS: Final = ("sasl.", "security.", "ssl.", "enable.ssl", "broker.", "client.", "socket.", "metadata.max")
# librdkafka's own errors begin with an underscore, and are public.
PARTITION_EOF: Final = KafkaError._PARTITION_EOF  # noqa: SLF001
LOGIN: Final = {KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError.SASL_AUTHENTICATION_FAILED}  # noqa: SLF001
PASSING: Final = {KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._ALL_BROKERS_DOWN}  # noqa: SLF001
DEFAULT_LIMIT: Final = 1_000_000  # bytes of a batch and of a message in librdkafka; Kafka's limit is a little larger
# A message that was not sent, because the producer had stopped after another one.
LOST: Final = {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT, KafkaError._FATAL,  # noqa: SLF001
               KafkaError._GAPLESS_GUARANTEE}  # fmt: skip  # noqa: SLF001
_FENCED: Final = {KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH}  # noqa: SLF001
_DENIED: Final = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
}
TOO_LARGE: Final = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE}
_UNKNOWN_TOPIC: Final = {KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART}  # noqa: SLF001
_REFUSED: Final = {KafkaError.INVALID_RECORD, KafkaError.POLICY_VIOLATION, KafkaError.TOPIC_EXCEPTION,
                   KafkaError.INVALID_TIMESTAMP}  # fmt: skip
_OVERHEAD: Final = 128  # bytes that a message takes in addition to its key, content and headers, at most


def connection(sink: KafkaSink) -> dict[str, Any]:
    """Return the properties that every client of the sink has."""
    given = {name: value.get_secret_value() for name, value in sink.producer.items()}
    found: dict[str, Any] = {name: value for name, value in given.items() if name.startswith(_OF_CONNECTIONS)}
    return {"client.id": "cdcbridge", "log_level": 0, **found, "bootstrap.servers": ",".join(sink.bootstrap_servers)}


def producing(sink: KafkaSink, transactional_id: str | None, batch_size: int) -> dict[str, Any]:
    """Return the properties of the producer.

    Args:
        sink: The sink's configuration.
        transactional_id: The name of the lane, or None without transactions.
        batch_size: How many bytes the broker takes at once, for each topic.

    Raises:
        Unusable: `sink.producer` has a property that cdcbridge sets.
    """
    given = {name: value.get_secret_value() for name, value in sink.producer.items()}
    for name in sorted(_RESERVED & set(given)):
        raise Unusable(f"sink.producer must not set {name}", hint=f"Remove {name}: cdcbridge sets it.")
    wait = max(1000, int(sink.timeout * 1000))
    found = {
        "message.timeout.ms": wait,
        "batch.size": batch_size,
        "linger.ms": 1,
        **given,
        **connection(sink),
        "acks": "all",
        "enable.idempotence": True,
    }
    if transactional_id is None:
        # After a message that the broker refused, later ones of its partition must not pass it.
        return found | {"enable.gapless.guarantee": True}
    ours = {"transactional.id": transactional_id, "delivery.report.only.error": True}
    return {"transaction.timeout.ms": wait + 10_000, **found, **ours}


def largest(sink: KafkaSink) -> int:
    """Return how many bytes a message may have for the producer."""
    given = sink.producer.get("message.max.bytes")
    return DEFAULT_LIMIT if given is None else int(given.get_secret_value())


def impossible(message: Outgoing, limit: int, topic_limit: int) -> Failure | None:
    """Return why a message cannot be sent, or None.

    Args:
        message: The message.
        limit: `message.max.bytes` of the producer.
        topic_limit: `max.message.bytes` of the topic.
    """
    size = len(message.body or b"") + len(message.key or "") + _OVERHEAD
    if size > min(limit, topic_limit) // 2:  # the exact size matters
        size = len(message.body or b"") + len((message.key or "").encode()) + _OVERHEAD
        size += sum(len(name) + len(value.encode()) for name, value in message.headers.items())
        if size > limit:
            return Failure(f"the message has {size} bytes, and message.max.bytes of sink.producer is {limit}", True)
        if size > topic_limit:
            topic = message.destination
            return Failure(
                f"the message has {size} bytes, and max.message.bytes of topic {topic} is {topic_limit}", True
            )
    return None


def error_in(exception: KafkaException) -> KafkaError:
    """Return the error that an exception carries."""
    error: KafkaError = exception.args[0]
    return error


def create_command(sink: KafkaSink, topic: str, options: str = "--partitions 4") -> str:
    """Return the command that creates a topic."""
    servers = ",".join(sink.bootstrap_servers)
    return f"kafka-topics.sh --bootstrap-server {servers} --create --topic {topic} {options}"


def refused(error: KafkaError, *, at: str) -> TargetAway | Displaced | Unusable:
    """Return the exception for an error that does not concern a single message.

    Args:
        error: The error.
        at: What failed, for example `the transaction`.
    """
    code, text = error.code(), f"Kafka refuses {at}: {error.str()}"
    if code in _FENCED:
        return Displaced(f"another process has taken over the lane: {error.str()}")
    if code in LOGIN:
        return Unusable(text, hint=HINT)
    if code in _DENIED:
        return Unusable(
            text, hint="allow the user to Write and Describe topics and transactional ids, with kafka-acls.sh"
        )
    return TargetAway(text)


def judged(error: KafkaError, message: Outgoing, sink: KafkaSink) -> Failure:
    """Return the failure of a message that the broker refused.

    Raises:
        TargetAway: The broker takes no messages at present.
        Displaced: Another process has taken over the lane.
        Unusable: The user has no rights.
    """
    code, text = error.code(), error.str()
    if code in TOO_LARGE:
        size = len(message.body or b"")
        return Failure(
            f"{text}: the message has {size} bytes and headers, more than max.message.bytes of topic"
            f" {message.destination} or message.max.bytes of sink.producer",
            for_good=True,
        )
    if code in _UNKNOWN_TOPIC:
        return missing(message.destination, sink)
    if code in _REFUSED:
        return Failure(f"Kafka refuses the message: {text}", for_good=True)
    if code == KafkaError.TOPIC_AUTHORIZATION_FAILED:
        return Failure(f"Kafka refuses the message: the user may not write to topic {message.destination}")
    raise refused(error, at=f"topic {message.destination}")


def missing(topic: str, sink: KafkaSink) -> Failure:
    """Return the failure of a message whose topic does not exist."""
    return Failure(f"there is no topic {topic}; create it with `{create_command(sink, topic)}`")


def partition(topic: str, number: int, offset: int) -> TopicPartition:
    """Return a place in a topic."""
    return TopicPartition(topic, number, offset)


def serve(producer: Producer, seconds: float = 0) -> None:
    """Let librdkafka call our functions. An error that stops the producer also reaches the next use of it."""
    with contextlib.suppress(KafkaException):
        producer.poll(seconds)
