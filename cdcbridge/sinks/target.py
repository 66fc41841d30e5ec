"""The interface between the sinks' engine and an adapter for one type of target.

An adapter is a class derived from Target. The engine creates one instance for each lane that it delivers in order
(mode `stream`), or one instance for all claims (modes `fifo` and `queue`). It then calls open(), position(), deliver()
as often as there are batches, and close(). docs/SINKS.md shows how to write an adapter. This module never contacts a
target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from cdcbridge.config.sink_base import SinkBase
from cdcbridge.errors import CdcbridgeError, UsageError
from cdcbridge.problem import Problem

S_co = TypeVar("S_co", bound=SinkBase, covariant=True)


class Outgoing(NamedTuple):
    """A message in the form in which it is delivered.

    Attributes:
        seq: The number of the message in the log. Seqs rise within a lane.
        id: The identity of the message, which is the same at each delivery.
        key: The key, or None. Messages of one key are in order.
        partition: The partition of the log.
        destination: The place in the target, for example the topic or the path of a file.
        body: The content. None: a tombstone, which follows a delete in topics that Kafka compacts.
        headers: Names and values that describe the message beside its content.
        deliver_count: How many times the message was delivered, this time included. 1 in mode `stream`.
    """

    seq: int
    id: str
    key: str | None
    partition: int
    destination: str
    body: bytes | None
    headers: Mapping[str, str]
    deliver_count: int = 1


class Failure(NamedTuple):
    """What became of a message that was not delivered.

    Attributes:
        reason: The target's answer in words.
        for_good: True if the target would refuse the message each time, for example because it is too large.
        retry_after: Seconds to wait before the next attempt, if the target named a time.
    """

    reason: str
    for_good: bool = False
    retry_after: float | None = None


class TargetAway(CdcbridgeError):
    """The target cannot be reached, or cannot take anything at present. The engine tries again, for ever.

    It is not known whether messages of the batch were delivered.

    Attributes:
        retry_after: Seconds to wait before the next attempt, if the target named a time.
    """

    def __init__(self, message: str, *, hint: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class TargetGone(CdcbridgeError):
    """The target wants no more messages, for example a webhook that answers 410. The engine pauses the consumer."""


class Displaced(CdcbridgeError):
    """Another process has taken over the lane, and the target refuses this one. The engine ends the lane."""


class Unusable(UsageError):
    """The target, or the configuration, lacks something that only a person can give, for example a topic.

    The engine tries again from time to time, because the fix may be made in the target.
    """


class Lane(NamedTuple):
    """The part of a consumer's messages that one target instance delivers in order.

    Attributes:
        consumer: The name of the consumer.
        store: A name of the store, which distinguishes two stores with a consumer of the same name.
        number: The number of the lane.
        of: The number of lanes of the consumer. Lane n has the partitions p with p % of == n.
    """

    consumer: str
    store: str
    number: int
    of: int

    @property
    def system(self) -> str:
        """The source's system identifier, with which the identity of each message begins."""
        return self.store.partition("-")[0]

    @property
    def name(self) -> str:
        """A name that is the same in each process: for a transactional id, or for a progress record."""
        return f"cdcbridge/{self.store}/{self.consumer}/{self.number}"


class Target(ABC, Generic[S_co]):
    """One connection to the target of a sink.

    Args:
        sink: The sink's configuration.
        lane: The lane, or None in the modes `fifo` and `queue`.

    Attributes:
        extra: The name of the extra that installs the adapter's client library, for example `kafka`. None: no library.
        remembers: Whether the target can say which message it has last. Then a message is there once.
        attribute_prefix: The prefix of CloudEvents attributes among the headers, as the protocol's binding says. None:
            the target has no headers, so that `content_mode: binary` is refused.
    """

    extra: ClassVar[str | None] = None
    remembers: bool = False
    attribute_prefix: ClassVar[str | None] = None

    def __init__(self, sink: S_co, lane: Lane | None) -> None:
        self.sink = sink
        self.lane = lane

    @classmethod
    def lanes(cls, sink: Any, partitions: int) -> int:
        """Return the number of lanes in mode `stream`, between 1 and the number of the log's partitions.

        With 1, the target gets all messages in the order of the log. With `partitions`, each partition is a lane, and
        the messages of each key are in order.
        """
        return partitions

    @abstractmethod
    async def open(self) -> None:
        """Connect. In a lane, also make sure that an earlier holder of the lane can deliver nothing more.

        Raises:
            TargetAway: The target cannot be reached.
            Unusable: Something is missing that only a person can give.
        """

    async def position(self) -> int | None:
        """Return the seq of the last message of the lane that the target has.

        The engine continues after it. 0: the target surely never had one, or lost all. The engine then begins where the
        lane began. None: the target cannot say, for example because it drops messages after some time. The engine then
        continues from the offset in the store. Called after open().

        Raises:
            TargetAway: The target cannot be reached.
        """
        return None

    @abstractmethod
    async def deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        """Deliver a batch, and return what went wrong, by the index in the batch.

        A message without a Failure is delivered: the target has answered that it is stored. If a message of a key is
        not delivered, no later message of that key may be delivered. In a lane of a target that `remembers`, nothing
        may be delivered after the first message that is not. If the call is cancelled, the engine closes the target.

        Raises:
            TargetAway: The target cannot be reached or is busy. The whole batch is delivered again.
            TargetGone: The target wants no more messages.
            Displaced: Another process has taken over the lane.
            Unusable: Something is missing that only a person can give.
        """

    @abstractmethod
    async def close(self) -> None:
        """Disconnect. Also called after an error and after a cancelled call, and more than once. Raises nothing."""

    async def check(self) -> Sequence[Problem]:
        """Reach the target, and return what is missing, each with its fix. Called instead of open()."""
        try:
            await self.open()
        except (TargetAway, Unusable) as error:
            code = "sink_unreachable" if isinstance(error, TargetAway) else "sink_unusable"
            return [Problem(code, "error", self.sink.type, str(error), error.hint or "")]
        finally:
            await self.close()
        return []
