"""Deliver to topics of Kafka by librdkafka.

In mode `stream`, each lane has a transactional id. A batch is one transaction, which also writes the lane's progress
to the topic `cdcbridge-progress`. open() calls init_transactions(), which ends the transaction of an earlier holder of
the lane and fences it. position() then reads the lane's progress. A reader with isolation.level read_committed
therefore gets each message once. https://kafka.apache.org/documentation/#semantics

With `transactions: false`, and in the modes `fifo` and `queue`, the producer is idempotent and each message has a
delivery report. A message may then arrive twice after a restart, with the same `cdcbridge-id`.

The key of a message is the key of its Kafka record, and librdkafka's partitioner chooses the partition by it. The
default `consistent_random` differs from that of Java clients: `producer: {partitioner: murmur2_random}` is like theirs.

librdkafka blocks, so that it runs in threads of the instance. Never counts a message as delivered without the answer
of all in-sync replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any, ClassVar, Final, TypeVar

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from cdcbridge.config.sink import KafkaSink
from cdcbridge.problem import Problem
from cdcbridge.sinks.target import Displaced, Failure, Lane, Outgoing, Target, TargetAway, Unusable
from cdcbridge.sinks.targets.kafka_client import (
    DEFAULT_LIMIT,
    HINT,
    LOGIN,
    LOST,
    PASSING,
    TOO_LARGE,
    create_command,
    error_in,
    impossible,
    judged,
    largest,
    missing,
    producing,
    refused,
    serve,
)
from cdcbridge.sinks.targets.kafka_progress import TOPIC, ProgressTopic, record, settings

T = TypeVar("T")
_PLACEHOLDER: Final = re.compile(r"\{[^{}]*\}")
_LANES: Final = 4
_UNREAD: Final = -1
_LARGEST: Final = 10_000  # messages in a transaction
_SLICE: Final = 0.2  # seconds that a thread blocks before it looks whether the instance was closed
_WAITS: Final = Failure("an earlier message was not delivered")


class KafkaTarget(Target[KafkaSink]):
    """One producer."""

    extra: ClassVar[str | None] = "kafka"
    attribute_prefix: ClassVar[str | None] = "ce_"

    def __init__(self, sink: KafkaSink, lane: Lane | None) -> None:
        super().__init__(sink, lane)
        self._transactional = lane is not None and sink.transactions
        self.remembers = self._transactional  # the progress is written in transactions alone
        self._largest = largest(sink)
        self._threads: ThreadPoolExecutor | None = None
        self._connected: Producer | None = None
        self._polling: asyncio.Task[None] | None = None
        self._closing = False
        self._topics: dict[str, int] = {}  # how many bytes each topic takes at once
        self._batch_size = DEFAULT_LIMIT
        self._reason: KafkaError | None = None
        self._size = _LARGEST
        self._place: int | None = _UNREAD  # the progress of the lane

    @classmethod
    def lanes(cls, sink: Any, partitions: int) -> int:
        """Return 4, or the number of partitions if it is less. Each lane has transactions of its own."""
        return min(_LANES, partitions)

    @property
    def _producer(self) -> Producer:
        if self._connected is None:
            raise TargetAway("the Kafka sink is not connected")
        return self._connected

    async def open(self) -> None:
        await self.close()
        self._closing = False
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="kafka-sink")
        try:
            self._place = _UNREAD
            await self._in_thread(self._start)
        except BaseException:
            await self.close()
            raise
        if not self._transactional:
            self._polling = asyncio.create_task(self._poll())

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        if self._threads is None:
            raise TargetAway("the Kafka sink is not connected")
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    def _start(self) -> None:
        self._connected = self._new_producer(None)
        metadata = self._repeated(lambda seconds: self._producer.list_topics(timeout=seconds), "the connection")
        there = [topic for topic, found in metadata.topics.items() if found.error is None]
        pattern = re.compile(".*".join(map(re.escape, _PLACEHOLDER.split(self.sink.topic))))
        self._topics, self._batch_size = {}, DEFAULT_LIMIT
        self._learn([topic for topic in there if pattern.fullmatch(topic)], opening=True)
        self._batch_size = min([DEFAULT_LIMIT, *self._topics.values()])
        if "{" not in self.sink.topic and not self._exists(self.sink.topic):
            raise Unusable(f"there is no topic {self.sink.topic}", hint=create_command(self.sink, self.sink.topic))
        if self._transactional and TOPIC not in there:
            ProgressTopic(self.sink, lambda: self._closing).create(len(metadata.brokers))
        self._begin_lane()

    def _begin_lane(self) -> None:
        """Begin with a new producer. In a lane, this ends the transaction of the one before, and fences it."""
        lane = self.lane if self._transactional else None
        self._connected = self._new_producer(None if lane is None else lane.name)
        if lane is not None:
            self._repeated(self._producer.init_transactions, "the transactional id")

    def _begin_lane_again(self) -> None:
        """Begin after a failed transaction. Another process may have delivered in the meantime."""
        self._begin_lane()
        if self._place != _UNREAD and self._last() != self._place:
            raise Displaced("another process has delivered messages of the lane")

    def _new_producer(self, name: str | None) -> Producer:
        properties = producing(self.sink, name, self._batch_size)
        try:
            return Producer({**properties, "error_cb": self._heard})
        except KafkaException as exception:
            raise Unusable(f"librdkafka refuses sink.producer: {error_in(exception).str()}", hint=HINT) from None

    def _learn(self, topics: Sequence[str], *, opening: bool = False) -> None:
        """Read how many bytes topics take at once. librdkafka must not send more than that together."""
        limits = settings(self.sink, topics, "max.message.bytes")
        for topic in topics:
            self._topics[topic] = int(limits.get(topic, DEFAULT_LIMIT))
            if self._topics[topic] < self._batch_size and not opening:
                raise TargetAway(f"topic {topic} takes smaller batches than those before it, so the sink reconnects")

    def _heard(self, error: KafkaError) -> None:
        """Remember why the broker cannot be reached. librdkafka itself tries again."""
        if self._reason is None or self._reason.code() not in LOGIN:
            self._reason = error

    def _repeated(self, call: Callable[[float], T], at: str) -> T:
        """Call a function that may time out, until it succeeds or the sink's timeout has passed."""
        deadline = monotonic() + self.sink.timeout
        self._reason = None
        while True:
            try:
                return call(_SLICE)
            except KafkaException as exception:
                error = error_in(exception)
            reason = self._why() or error
            if reason.code() in LOGIN:
                raise refused(reason, at=at)
            waits = error.retriable() or error.code() in PASSING
            if error.txn_requires_abort():
                raise KafkaException(error)
            if self._closing or not waits:
                raise refused(error, at=at)
            if monotonic() > deadline:
                raise TargetAway(f"Kafka has not answered within {self.sink.timeout:g} s: {reason.str()}")

    def _why(self) -> KafkaError | None:
        """Return why the broker cannot be reached, if librdkafka has found a reason."""
        serve(self._producer)  # calls _heard()
        return self._reason

    def _exists(self, topic: str) -> bool:
        """Return whether a topic exists. A broker that creates topics by itself creates it."""
        if topic in self._topics:
            return True
        deadline = monotonic() + min(1.0, self.sink.timeout)
        while not self._closing and monotonic() < deadline:
            found = self._repeated(lambda seconds: self._producer.list_topics(topic, timeout=seconds), f"topic {topic}")
            error = found.topics[topic].error
            if error is None:
                self._learn([topic])
                return True
            if error.code() not in {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.LEADER_NOT_AVAILABLE}:
                return bool(error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED)  # the answer to a message is clearer
        return False

    async def position(self) -> int | None:
        if self.lane is None or not self._transactional:
            return None
        self._place = await self._in_thread(self._last)
        return self._place

    def _last(self) -> int | None:
        return None if self.lane is None else ProgressTopic(self.sink, lambda: self._closing).last(self.lane)

    async def deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        if self._transactional:
            return await self._in_thread(self._in_transactions, batch)
        return await self._reported(batch)

    def _impossible(self, message: Outgoing) -> Failure | None:
        if not self._exists(message.destination):
            return missing(message.destination, self.sink)
        return impossible(message, self._largest, self._topics.get(message.destination, DEFAULT_LIMIT))

    def _in_transactions(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        failure, end = None, len(batch)
        for index, message in enumerate(batch):
            if failure := self._impossible(message):
                end = index
                break
        sent = 0
        while sent < end:
            part = batch[sent : min(end, sent + self._size)]
            error = self._transact(part)
            if error is None:
                sent += len(part)
                self._place = part[-1].seq
                continue
            judgement = judged(error, part[0], self.sink)  # raises if another process has taken over the lane
            self._begin_lane_again()
            if len(part) > 1:  # Kafka refuses messages together. One message alone shows whether it is the reason.
                self._size = len(part) // 2
            else:
                failure, end = judgement, sent
                self._size = _LARGEST
        return {} if failure is None else {end: failure} | dict.fromkeys(range(end + 1, len(batch)), _WAITS)

    def _transact(self, batch: Sequence[Outgoing]) -> KafkaError | None:
        """Deliver messages and the progress in one transaction, and return why it failed, or None."""
        lane = self.lane
        if lane is None:
            raise TypeError("transactions belong to a lane")
        errors: list[KafkaError] = []

        def report(error: KafkaError | None, _: Message) -> None:
            if error is not None:
                errors.append(error)

        producer = self._producer
        try:
            producer.begin_transaction()
            for message in batch:
                self._produce(message, report)
            producer.produce(TOPIC, record(lane, batch[-1].seq), lane.name.encode(), on_delivery=report)
            self._repeated(producer.commit_transaction, "the transaction")
        except KafkaException as exception:
            errors.append(error_in(exception))
        else:
            return None
        serve(producer)  # calls report()
        return next((error for error in errors if error.code() not in LOST), errors[0])

    def _produce(
        self, message: Outgoing, report: Callable[[KafkaError | None, Message], None], producer: Producer | None = None
    ) -> None:
        producer = producer or self._producer
        key = None if message.key is None else message.key.encode()
        while True:
            try:
                return producer.produce(
                    message.destination, message.body, key, headers=dict(message.headers), on_delivery=report
                )
            except BufferError:
                serve(producer, _SLICE)
                if self._closing:
                    raise TargetAway("the Kafka sink was closed") from None

    async def _reported(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[dict[int, KafkaError]] = loop.create_future()
        failures = await self._in_thread(self._produce_all, batch, loop, done)
        errors = await done
        if any(error.code() in TOO_LARGE for error in errors.values()):
            return failures | await self._in_thread(self._one_by_one, {index: batch[index] for index in sorted(errors)})
        for index, error in sorted(errors.items()):
            if error.code() in LOST:
                raise TargetAway("the producer has stopped after a message that Kafka refused")
            failures[index] = judged(error, batch[index], self.sink)
        return failures

    def _produce_all(
        self, batch: Sequence[Outgoing], loop: asyncio.AbstractEventLoop, done: asyncio.Future[dict[int, KafkaError]]
    ) -> dict[int, Failure]:
        """Give all messages to librdkafka, and return those that it cannot take.

        Later, `done` gets the errors of the others.
        """
        failures: dict[int, Failure] = {}
        errors: dict[int, KafkaError] = {}
        failed: set[str | None] = set()
        lock, waiting = threading.Lock(), 1

        def reported(index: int, error: KafkaError | None) -> None:
            nonlocal waiting
            with lock:  # another thread polls
                waiting -= 1
                last = waiting == 0
            if error is not None:
                errors[index] = error
            if last:
                loop.call_soon_threadsafe(_finish, done, errors)

        for index, message in enumerate(batch):
            failure = _WAITS if message.key in failed else self._impossible(message)
            if failure is not None:
                failures[index] = failure
                failed |= {message.key} - {None}
                continue
            with lock:
                waiting += 1
            try:
                self._produce(message, lambda error, _, index=index: reported(index, error))  # type: ignore[misc]
            except KafkaException as exception:
                reported(index, error_in(exception))
                failed |= {message.key} - {None}
        reported(-1, None)
        return failures

    def _one_by_one(self, messages: Mapping[int, Outgoing]) -> dict[int, Failure]:
        """Find out which messages are too large. Kafka refuses a request, in which there are also others."""
        producer = self._new_producer(None)
        failures: dict[int, Failure] = {}
        failed: set[str | None] = set()
        for index, message in messages.items():
            errors: list[KafkaError | None] = []
            if message.key in failed:
                failures[index] = _WAITS
                continue
            self._produce(message, lambda error, _, errors=errors: errors.append(error), producer)  # type: ignore[misc]
            while not errors:
                serve(producer, _SLICE)
            if errors[0] is not None:
                failures[index] = judged(errors[0], message, self.sink)
                failed |= {message.key} - {None}
                producer = self._new_producer(None)
        return failures

    async def _poll(self) -> None:
        """Take delivery reports from librdkafka, which calls the functions that were given to produce()."""
        while not self._closing:
            await self._in_thread(serve, self._producer, _SLICE)

    async def close(self) -> None:
        self._closing = True
        (polling, self._polling), (threads, self._threads) = (self._polling, None), (self._threads, None)
        if threads is not None:
            if polling is not None:
                with contextlib.suppress(Exception):
                    await polling
            # Calls in progress end within a slice. But librdkafka waits by the wall clock, so one can last for hours
            # after the clock was set back. It then keeps its threads, and the next instance fences its producer.
            ending = ThreadPoolExecutor(1, thread_name_prefix="kafka-end")
            ended = asyncio.get_running_loop().run_in_executor(ending, self._destroy, threads)
            ending.shutdown(wait=False)
            await asyncio.wait([ended], timeout=self.sink.timeout)

    def _destroy(self, threads: ThreadPoolExecutor) -> None:
        producer, self._connected = self._connected, None
        if producer is not None:
            producer.purge()
            threads.submit(serve, producer)
        del producer
        threads.shutdown(wait=True)

    async def check(self) -> Sequence[Problem]:
        """Return the problems, for example missing rights, or a progress topic whose records are dropped."""
        found = await super().check()
        if found or self.lane is None or not self._transactional:
            return found
        policy = await asyncio.to_thread(ProgressTopic(self.sink, lambda: False).policy)
        if policy in {None, "compact"}:
            return []
        fix = (f"kafka-configs.sh --bootstrap-server {','.join(self.sink.bootstrap_servers)} --alter --topic {TOPIC}"
               " --add-config cleanup.policy=compact")  # fmt: skip
        message = f"topic {TOPIC} has cleanup.policy {policy}, so that Kafka drops the progress of a lane that is idle"
        return [Problem("sink_progress", "error", TOPIC, message, fix)]


def _finish(done: asyncio.Future[dict[int, KafkaError]], errors: dict[int, KafkaError]) -> None:
    if not done.done():
        done.set_result(errors)
