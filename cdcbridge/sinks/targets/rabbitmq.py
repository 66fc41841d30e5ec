"""Deliver to a stream or to an exchange of RabbitMQ.

A stream, in mode `stream`, has each message once: the name of the lane is the reference of the publisher, and the seq
is the publishing id. RabbitMQ stores no message whose publishing id is not larger than the last one of its reference
(https://www.rabbitmq.com/blog/2021/07/28/rabbitmq-streams-message-deduplication). The last id is the position. All
messages are in one lane, in the order of the log. An earlier holder of the lane can do no harm: it sends the same
messages, in order and after messages that were confirmed, so that nothing can be missing before them.

An exchange gets each message at least once, with publisher confirms (https://www.rabbitmq.com/docs/confirms), so that
readers recognise a repeat by `message_id`. A message that no queue takes is returned by RabbitMQ, because it is
published as mandatory.

Never counts a message as delivered before RabbitMQ has confirmed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cdcbridge.config.sink import RabbitmqSink
from cdcbridge.sinks.target import Failure, Lane, Outgoing, Target
from cdcbridge.sinks.targets.rabbitmq_exchange import ExchangePublisher
from cdcbridge.sinks.targets.rabbitmq_stream import StreamPublisher


class RabbitmqTarget(Target[RabbitmqSink]):
    """A connection to the stream or to the exchange of a sink."""

    extra = "rabbitmq"
    attribute_prefix = "cloudEvents_"

    def __init__(self, sink: RabbitmqSink, lane: Lane | None) -> None:
        super().__init__(sink, lane)
        self.remembers = sink.stream is not None
        self._publisher = ExchangePublisher(sink) if sink.stream is None else StreamPublisher(sink, lane)

    @classmethod
    def lanes(cls, sink: RabbitmqSink, partitions: int) -> int:
        """Return 1 for a stream, which then has the order of the log, else `partitions`."""
        return partitions if sink.stream is None else 1

    async def open(self) -> None:
        """Connect, and see that the stream or the exchange exists."""
        await self._publisher.open()

    async def position(self) -> int | None:
        """Return the last publishing id of the lane in the stream. An exchange remembers nothing."""
        return await self._publisher.position() if isinstance(self._publisher, StreamPublisher) else None

    async def deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        """Publish a batch, and wait until RabbitMQ has confirmed it."""
        return await self._publisher.deliver(batch)

    async def close(self) -> None:
        """Disconnect."""
        await self._publisher.close()
