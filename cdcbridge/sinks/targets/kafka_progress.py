"""Keep the progress of the lanes in a compacted topic, in the same transactions as the messages.

The key of a record is the name of the lane, and its value is for example `{"seq": 42, "of": 4}`. The newest record is
read with isolation.level read_committed, after init_transactions() has fenced the earlier holder of the lane.
https://kafka.apache.org/documentation/#semantics explains both. Never writes outside a transaction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Final

import orjson
from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource, OffsetSpec  # type: ignore[attr-defined]
from confluent_kafka.cimpl import NewTopic

from cdcbridge.config.sink import KafkaSink
from cdcbridge.sinks.target import Lane, TargetAway, Unusable
from cdcbridge.sinks.targets.kafka_client import (
    PARTITION_EOF,
    connection,
    create_command,
    error_in,
    partition,
    refused,
)

TOPIC: Final = "cdcbridge-progress"
_REPLICAS: Final = 3
_REQUEST: Final = 5.0  # seconds for a request, because it cannot be interrupted
_WINDOW: Final = 1000  # records that are read first, from the end
_SETTINGS: Final = {"cleanup.policy": "compact", "segment.bytes": str(16 << 20), "min.cleanable.dirty.ratio": "0.1"}


def record(lane: Lane, seq: int) -> bytes:
    """Return the value of a lane's record."""
    return b'{"seq":%d,"of":%d}' % (seq, lane.of)


def settings(sink: KafkaSink, topics: Sequence[str], name: str) -> dict[str, str]:
    """Return a setting of topics. A topic is left out if the user may not read its settings."""
    found = {}
    resources = [ConfigResource(ConfigResource.Type.TOPIC, topic) for topic in topics]
    if resources:
        admin = AdminClient(connection(sink))  # its answers need it
        answers = admin.describe_configs(resources, request_timeout=_REQUEST)
        for resource, answer in answers.items():
            with contextlib.suppress(KafkaException):
                found[str(resource.name)] = str(answer.result()[name].value)
    return found


class ProgressTopic:
    """Reads the progress topic. All methods block, and belong into a thread.

    Args:
        sink: The sink's configuration.
        stopped: Returns True if the reader is to end early.
    """

    def __init__(self, sink: KafkaSink, stopped: Callable[[], bool]) -> None:
        self._sink = sink
        self._stopped = stopped
        self._deadline = monotonic() + sink.timeout

    @property
    def _left(self) -> float:
        left = self._deadline - monotonic()
        if left <= 0 or self._stopped():
            raise TargetAway(f"Kafka has not answered within {self._sink.timeout:g} s")
        return left

    def create(self, brokers: int) -> None:
        """Create the topic. Another lane may do the same.

        Raises:
            Unusable: The user may not create topics.
            TargetAway: No broker answers.
        """
        replicas = min(_REPLICAS, brokers)
        admin = AdminClient(connection(self._sink))
        topic = NewTopic(TOPIC, 1, replicas, config=_SETTINGS)
        try:
            admin.create_topics([topic], request_timeout=min(_REQUEST, self._left))[TOPIC].result()
        except KafkaException as exception:
            error = error_in(exception)
            if error.code() in {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED,
                                KafkaError.POLICY_VIOLATION}:  # fmt: skip
                options = f"--partitions 1 --replication-factor {replicas} --config cleanup.policy=compact"
                raise Unusable(
                    f"there is no topic {TOPIC}, and Kafka refuses to create it: {error.str()}",
                    hint=create_command(self._sink, TOPIC, options),
                ) from None
            if error.code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise refused(error, at=f"the creation of topic {TOPIC}") from None

    def policy(self) -> str | None:
        """Return the topic's cleanup.policy, or None if it cannot be read."""
        return settings(self._sink, [TOPIC], "cleanup.policy").get(TOPIC)

    def last(self, lane: Lane) -> int | None:
        """Return the seq of the lane's newest record, or None.

        Raises:
            TargetAway: No broker answers, or a transaction of another lane stays open.
        """
        found: list[tuple[int, int, int]] = []
        try:
            for number, (first, end) in self._ends().items():
                size = _WINDOW
                newest = None
                while newest is None and (start := max(first, end - size)) < end:
                    newest = self._newest(lane, number, start, end)
                    size *= 10
                    if start == first:
                        break
                if newest is not None:
                    found.append(newest)
        except KafkaException as exception:
            raise refused(error_in(exception), at=f"reading topic {TOPIC}") from None
        if not found:
            return None
        _, seq, of = max(found)
        return seq if of == lane.of else None

    def _ends(self) -> dict[int, tuple[int, int]]:
        """Return the first offset of each partition, and the offset after its last record, committed or not."""
        admin = AdminClient(connection(self._sink))
        metadata = admin.list_topics(TOPIC, timeout=min(_REQUEST, self._left)).topics[TOPIC]
        if metadata.error is not None:
            raise KafkaException(metadata.error)

        def offsets(spec: OffsetSpec) -> dict[int, int]:
            asked = {partition(TOPIC, number, -1): spec for number in metadata.partitions}
            answers = admin.list_offsets(
                asked, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=min(_REQUEST, self._left)
            )
            return {place.partition: answer.result().offset for place, answer in answers.items()}

        firsts, ends = offsets(OffsetSpec.earliest()), offsets(OffsetSpec.latest())  # type: ignore[no-untyped-call]
        return {number: (firsts[number], end) for number, end in ends.items()}

    def _newest(self, lane: Lane, number: int, start: int, end: int) -> tuple[int, int, int] | None:
        """Return time, seq and number of lanes of the lane's last record between two offsets."""
        found = None
        name = lane.name.encode()
        consumer = Consumer(
            connection(self._sink)
            | {
                "group.id": "cdcbridge-progress",
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "earliest",
            }
        )
        try:
            consumer.assign([partition(TOPIC, number, start)])
            while True:
                for message in consumer.consume(500, timeout=min(0.2, self._left)):
                    error, offset = message.error(), message.offset()
                    if error is not None and error.code() != PARTITION_EOF:
                        raise KafkaException(error)
                    if error is None and message.key() == name:
                        content: dict[str, Any] = orjson.loads(message.value() or b"{}")
                        found = (message.timestamp()[1], content["seq"], content["of"])
                    # The end of the committed records is before `end` while another lane's transaction is open.
                    if offset is not None and offset >= end - (error is None):
                        return found
        finally:
            consumer.close()
