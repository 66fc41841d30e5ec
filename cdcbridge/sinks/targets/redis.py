"""Deliver to streams of Redis or Valkey.

In mode `stream`, the id of each entry is `SEQ-0`. Redis refuses an id that is not larger than the last one of its
stream (https://redis.io/docs/latest/commands/xadd/), so an entry cannot be there twice. A batch is one MULTI/EXEC: if
Redis is full, read-only or cut off, no entry of the batch is there, and no hole can arise that smaller ids could not
fill any more. Each lane has a small key of its own. Each transaction watches it, and opening the lane again touches
it, so that a transaction of an earlier holder no longer succeeds (https://redis.io/docs/latest/develop/using-commands/
transactions/). The last id of the stream is the position. If the names of the streams depend on more than the
partition, that key has the position.

In the modes `fifo` and `queue`, Redis chooses the ids, and readers recognise a repeat by the field `id`.

Never counts an entry as delivered before Redis has answered its XADD inside the transaction.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from redis import RedisError
from redis.exceptions import MovedError, ResponseError

from cdcbridge.config.sink import RedisSink
from cdcbridge.errors import CdcbridgeError
from cdcbridge.problem import Problem
from cdcbridge.routing.destination import Destination
from cdcbridge.sinks.target import Displaced, Failure, Lane, Outgoing, Target, TargetAway, Unusable
from cdcbridge.sinks.targets.hold_back import hold_back
from cdcbridge.sinks.targets.redis_connection import Command, Connection, Cut, place_of
from cdcbridge.sinks.targets.redis_entries import Entries
from cdcbridge.sinks.targets.redis_errors import first_word, said

_REDIRECTS: Final = 5  # between the nodes of a Redis Cluster
_MOST_KNOWN: Final = 10_000  # streams whose type is remembered
_MULTI: Final = ("MULTI",)
_EXEC: Final = ("EXEC",)


class _Moved(Exception):
    """Another node of the cluster has the stream."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"{host}:{port}")
        self.node = host, port


class _TooLarge(Exception):
    """Redis refused a message for its size, and closed the connection before anything of the batch was stored."""

    def __init__(self, index: int, answer: str) -> None:
        super().__init__(answer)
        self.index = index


class RedisTarget(Target[RedisSink]):
    """A connection for a lane, or one for each batch that is delivered at the same time."""

    extra = "redis"
    remembers = True

    def __init__(self, sink: RedisSink, lane: Lane | None) -> None:
        super().__init__(sink, lane)
        template = Destination(sink.stream)
        self._stream: str | None = None  # the only stream, if its name is known before any message
        if not template.placeholders:
            self._stream = sink.stream
        elif template.placeholders == {"partition"} and lane is not None:
            self._stream = template.fill({"partition": str(lane.number)})
        self._free: list[Connection] = []
        self._all: set[Connection] = set()
        self._streams: set[str] = set()  # keys that are streams, or that do not exist yet
        self._entries = Entries(sink.maxlen, in_lane=lane is not None)
        self._wait: list[Command] = (
            [("WAIT", sink.wait_replicas, int(sink.timeout * 500) or 1)] if sink.wait_replicas else []
        )

    @classmethod
    def lanes(cls, sink: RedisSink, partitions: int) -> int:
        """Return `partitions` if each partition has streams of its own, else 1."""
        return partitions if "partition" in Destination(sink.stream).placeholders else 1

    @property
    def _guard(self) -> str:
        """The key that a lane's transactions watch. In a cluster it is on the node of the stream."""
        if self.lane is None:
            raise TypeError("only a lane has a guard")
        tag = "" if self._stream is None else f"{{{_hash_tag(self._stream)}}}:"
        return f"cdcbridge:progress:{tag}{self.lane.name}"

    async def open(self) -> None:
        """Connect, and make the transactions of an earlier holder of the lane fail."""
        async with self._connection():
            pass

    async def close(self) -> None:
        """Disconnect."""
        connections, self._free, self._all = self._all, [], set()
        for connection in connections:
            await connection.close()

    async def position(self) -> int | None:
        """Return the seq of the last entry, also if `maxlen` has removed it since."""
        if self.lane is None:
            return None
        async with self._connection() as connection:
            return self._position(await self._one(connection, self._question))

    @property
    def _question(self) -> Command:
        return ("GET", self._guard) if self._stream is None else ("XINFO", "STREAM", self._stream)

    def _position(self, reply: Any) -> int | None:
        """Read the answer to the question for the position.

        Raises:
            Unusable: Another program writes to the stream.
        """
        if reply is None or (isinstance(reply, RedisError) and "no such key" in str(reply)):
            return 0  # Redis removes no stream by itself: it has lost it, or never had it
        if self._stream is None:
            return int(reply or 0)
        facts = dict(zip(reply[::2], reply[1::2], strict=True))
        seq, _, second = facts[b"last-generated-id"].partition(b"-")
        if second != b"0":
            raise self._foreign(self._stream, facts[b"last-generated-id"])
        self._accept(self._stream, facts[b"last-entry"])
        return int(seq)

    def _accept(self, stream: str, entry: Any) -> None:
        """Raise Unusable if the last entry of a stream is not from this source, so that its id has no meaning here."""
        if entry is None or self.lane is None:
            return
        fields = dict(zip(entry[1][::2], entry[1][1::2], strict=True))
        if not fields.get(b"id", b"").startswith(self.lane.system.encode() + b"/"):
            raise self._foreign(stream, entry[0])

    def _foreign(self, stream: str, last: bytes) -> Unusable:
        return Unusable(
            f"the last entry of the Redis stream {stream} ({last.decode()}) is from another program or another "
            "database, so its id does not say what is missing",
            hint=f"Choose another `stream` for the sink, or remove this one: redis-cli DEL {stream}",
        )

    async def deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        """Add the messages to their streams in one transaction."""
        failures: dict[int, Failure] = {}
        rest: Sequence[int] = range(len(batch))
        try:
            async with self._connection() as connection:
                await self._refuse_other_types(connection, batch, failures)
                hold_back(batch, failures, in_order=self.lane is not None)
                rest = [index for index in rest if index not in failures]
                if rest:
                    found = await self._add(connection, [batch[index] for index in rest])
                    failures |= {rest[index]: failure for index, failure in found.items()}
        except _TooLarge as error:
            size = len(batch[rest[error.index]].body or b"")
            failures[rest[error.index]] = Failure(
                f"Redis refused {size} bytes: {error}; its limit is proto-max-bulk-len, by default 512 MB",
                for_good=True,
            )
            hold_back(batch, failures, in_order=self.lane is not None)
            if others := [index for index in rest if index not in failures]:
                later = await self.deliver([batch[index] for index in others])
                failures |= {others[index]: failure for index, failure in later.items()}
        return failures

    async def _refuse_other_types(
        self, connection: Connection, batch: Sequence[Outgoing], failures: dict[int, Failure]
    ) -> None:
        """Find messages whose key in Redis is not a stream, before a transaction could add the others."""
        unknown = {message.destination for message in batch} - self._streams
        if not unknown:
            return
        names = sorted(unknown)
        types = dict(zip(names, await self._ask(connection, [("TYPE", name) for name in names]), strict=True))
        for kind in types.values():
            if isinstance(kind, RedisError):
                raise self._meaning(kind, connection)
        others = {name: kind.decode() for name, kind in types.items() if kind not in {b"none", b"stream"}}
        if len(self._streams) > _MOST_KNOWN:
            self._streams.clear()
        self._streams |= unknown - others.keys()
        for index, message in enumerate(batch):
            if message.destination in others:
                kind = others[message.destination]
                failures[index] = Failure(f"the key {message.destination} of Redis is a {kind}, not a stream", True)

    async def _add(self, connection: Connection, messages: Sequence[Outgoing]) -> dict[int, Failure]:
        """Run one transaction, and return the messages that it could not add.

        Raises:
            _TooLarge: Redis refused one message before the transaction.
        """
        lane = self.lane
        watch: list[Command] = [] if lane is None else [("WATCH", self._guard)]
        known = lane is None or self._stream is not None
        after = [*watch, *(self._wait if known else ())]
        number = len(messages) + 2
        try:
            data = [_MULTI, *self._entries.packed(messages), _EXEC, *after]
            replies = await self._ask(connection, data)
        except Cut as cut:
            if cut.replies and isinstance(cut.replies[-1], RedisError) and "Protocol error" in str(cut.replies[-1]):
                raise _TooLarge(len(cut.replies) - 2, said(cut.replies[-1])) from None
            raise
        self._judge(replies[:number], connection)
        failures = await self._judge_entries(connection, messages, replies[number - 1])
        if not known and not failures:
            record = ("SET", self._guard, messages[-1].seq)
            replies = await self._ask(connection, [_MULTI, record, _EXEC, *watch, *self._wait])
            self._judge(replies[:3], connection)
        if self._wait:
            self._replicated(replies[-1], connection)
        return failures

    def _judge(self, replies: Sequence[Any], connection: Connection) -> None:
        """Raise an error unless the transaction was executed."""
        executed = replies[-1]
        if executed is None:
            raise Displaced(f"another process delivers to Redis at {connection.place} for this lane")
        if isinstance(executed, RedisError):
            raise self._meaning(next(reply for reply in replies if isinstance(reply, RedisError)), connection)

    async def _judge_entries(
        self, connection: Connection, messages: Sequence[Outgoing], answers: Sequence[Any]
    ) -> dict[int, Failure]:
        refused = {index: answer for index, answer in enumerate(answers) if isinstance(answer, RedisError)}
        repeated = {index for index, answer in refused.items() if "equal or smaller" in str(answer)}
        for stream in {messages[index].destination for index in repeated}:
            last = await self._one(connection, ("XREVRANGE", stream, "+", "-", "COUNT", 1))
            self._accept(stream, last[0] if last else None)  # it is there already, if we wrote it
        self._streams -= {messages[index].destination for index in refused}
        return {
            index: Failure(f"Redis answered: {said(answer)}", for_good=first_word(answer) == "WRONGTYPE")
            for index, answer in refused.items()
            if index not in repeated
        }

    def _replicated(self, replicas: Any, connection: Connection) -> None:
        if isinstance(replicas, RedisError):
            raise self._meaning(replicas, connection)
        if replicas < self.sink.wait_replicas:
            raise TargetAway(
                f"{replicas} replicas of Redis at {connection.place} have the entries, "
                f"and `wait_replicas` asks for {self.sink.wait_replicas}",
                hint="Look at the replicas: redis-cli INFO replication",
            )

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        """Lend a connection. After any error it is closed, because answers may still be on their way."""
        connection = None
        try:
            connection = self._free.pop() if self._free else await self._connect()
            yield connection
            if connection in self._all:
                self._free.append(connection)
                connection = None
        except TimeoutError:
            where = place_of(self.sink.url.get_secret_value())
            raise TargetAway(f"Redis at {where} did not answer within {self.sink.timeout:g} s") from None
        except OSError as error:
            where = place_of(self.sink.url.get_secret_value())
            raise TargetAway(f"Redis at {where} cannot be reached: {error}") from error
        finally:
            if connection is not None:
                self._all.discard(connection)
                await connection.close()

    async def _connect(self) -> Connection:
        url, node = self.sink.url.get_secret_value(), None
        for _ in range(_REDIRECTS):
            async with asyncio.timeout(self.sink.timeout):
                connection = await Connection.open(url, self.sink.tls, node)
            self._all.add(connection)
            try:
                await self._settle(connection)
            except _Moved as moved:
                node = moved.node
            except BaseException:
                await self._drop(connection)
                raise
            else:
                return connection
            await self._drop(connection)
        raise TargetAway(
            f"the nodes of the Redis Cluster at {place_of(url)} name each other as owners of {self._stream}"
        )

    async def _drop(self, connection: Connection) -> None:
        self._all.discard(connection)
        await connection.close()

    async def _settle(self, connection: Connection) -> None:
        """Find the node of the stream. In a lane, touch its key first, and watch it from then on.

        Raises:
            _Moved: Another node has the stream.
        """
        if self.lane is None:
            questions: list[Command] = [] if self._stream is None else [("TYPE", self._stream)]
        else:
            # An empty APPEND changes nothing, and still counts as a change of the key for those that watch it.
            questions = [("APPEND", self._guard, ""), ("WATCH", self._guard), self._question, *self._wait]
        replies = await self._ask(connection, questions) if questions else []
        for reply in replies:
            if isinstance(reply, RedisError) and "no such key" not in str(reply):
                if isinstance(reply, MovedError) and self._stream is not None:
                    raise _Moved(reply.host or connection.host, reply.port)
                raise self._meaning(reply, connection)
        if self.lane is not None:
            self._position(replies[2])
            if self._wait:
                self._replicated(replies[3], connection)

    async def _ask(self, connection: Connection, commands: Collection[Command]) -> list[Any]:
        async with asyncio.timeout(self.sink.timeout):
            return await connection.ask(commands)

    async def _one(self, connection: Connection, command: Command) -> Any:
        (reply,) = await self._ask(connection, [command])
        if isinstance(reply, RedisError) and "no such key" not in str(reply):
            raise self._meaning(reply, connection)
        return reply

    def _meaning(self, answer: RedisError, connection: Connection) -> CdcbridgeError:
        if isinstance(answer, MovedError) and self._stream is not None:
            return TargetAway(f"Redis at {connection.place} answered: {said(answer)}")  # open() follows it
        return connection.meaning(answer)

    async def check(self) -> Sequence[Problem]:
        """Try an XADD in a transaction that is discarded. A lane that runs is not disturbed."""
        probe = RedisTarget(self.sink, None)
        probe._stream = self._stream  # a lane's, which another node of a cluster may have
        name = self._stream or self.sink.stream
        add = ("XADD", name, "*", "id", "check")
        try:
            async with probe._connection() as connection:
                policy = await probe._ask(connection, [("INFO", "memory")])
                for reply in await probe._ask(connection, [_MULTI, add, ("DISCARD",)]):
                    if isinstance(reply, RedisError) and first_word(reply) != "EXECABORT":
                        raise probe._meaning(reply, connection)
                kind = await probe._one(connection, ("TYPE", name))
                if kind not in {b"none", b"stream"}:
                    raise connection.meaning(ResponseError(f"WRONGTYPE {name} is a {kind.decode()}"))
        except (TargetAway, Unusable) as error:
            code = "sink_unreachable" if isinstance(error, TargetAway) else "sink_unusable"
            return [Problem(code, "error", "redis", str(error), error.hint or "")]
        finally:
            await probe.close()
        return _evicts(policy[0])


def _evicts(memory: Any) -> list[Problem]:
    if isinstance(memory, RedisError) or not (found := re.search(rb"maxmemory_policy:(allkeys-\w+)", memory)):
        return []
    policy = found[1].decode()
    return [
        Problem(
            "sink_evicts",
            "warning",
            "redis",
            f"maxmemory-policy {policy} lets Redis remove a whole stream when its memory is full",
            "redis-cli CONFIG SET maxmemory-policy noeviction",
        )
    ]


def _hash_tag(name: str) -> str:
    """Return the part of a key by which Redis Cluster chooses the node."""
    found = re.search(r"\{([^}]+)\}", name)
    return found[1] if found else name
