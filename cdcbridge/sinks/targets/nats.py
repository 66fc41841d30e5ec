"""Deliver to a stream of NATS JetStream.

A sink in mode `stream` has one lane, so that the NATS stream has the order of the log. Each message has the headers
`cdcbridge-lane` and `cdcbridge-seq`. position() reads them from the end of the NATS stream.

- NATS 2.12 and newer, with `allow_atomic`: up to 1,000 messages are an atomic batch, which is stored as a whole or not
  at all. Its first message names the sequence after which it must be stored (`Nats-Expected-Last-Sequence`). The server
  refuses it if any other program has written since. https://docs.nats.io/nats-concepts/jetstream/streams
- Older servers: each message names the message before it (`Nats-Expected-Last-Msg-Id`). If one is refused, then all
  later ones are, too. `Nats-Msg-Id` also removes repeated messages within the stream's duplicate window.

If the server refuses the place of a batch, the adapter reads the end of the NATS stream again. It continues if only
foreign messages were added, and ends with Displaced if another process delivers the same lane.

In the modes `fifo` and `queue`, each message has `Nats-Msg-Id` and its own answer, and a key's next message waits for
the answer to the one before. Never counts a message as delivered without the PubAck of the configured stream.
"""

from __future__ import annotations

import asyncio
import base64
import random
import re
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

from cdcbridge.config.sink import NatsSink
from cdcbridge.problem import Problem
from cdcbridge.sinks.target import Displaced, Failure, Lane, Outgoing, Target, TargetAway, Unusable
from cdcbridge.sinks.targets.nats_client import NO_RESPONDERS, Answer, NatsClient, NatsError, NatsMessage
from cdcbridge.sinks.targets.nats_subjects import overlap, pattern_of, valid
from cdcbridge.sinks.targets.tls import client_context

T = TypeVar("T")
_Head = dict[str, str]
_LARGEST_ATOMIC: Final = 1000  # messages in an atomic batch, by default of the server
_CONNECT: Final = 5.0  # seconds for one server of several
_WINDOW: Final = 256  # messages that are read at once to find the lane's last one
_HEADERS: Final = 512  # bytes of headers that the adapter adds, at most
# https://github.com/nats-io/nats-server/blob/main/server/errors.json
_NO_STREAM: Final = 10059
_NO_MESSAGE: Final = 10037
_TOO_LARGE: Final = 10054
_NOT_ATOMIC: Final = 10174
_MOVED: Final = frozenset({10070, 10071, 10164})  # another last message than the expected one
_COMMIT: Final = {"Nats-Batch-Commit": "1"}
_WAITS: Final = Failure("an earlier message was not delivered")
_REPEATED: Final = NatsError(409, 0, "the stream already has another message with this Nats-Msg-Id")
_LINE: Final = re.compile(rb"^(cdcbridge-(?:lane|seq)): (.*?)\r$", re.MULTILINE)


class _Stream(NamedTuple):
    """The JetStream stream as the server describes it."""

    subjects: Sequence[str]
    atomic: bool
    kept: bool  # messages stay until a limit, and are not removed when a reader has them
    largest: int
    first: int
    last: int


class _Place(NamedTuple):
    """The lane's last message in the stream."""

    number: int  # in the stream
    seq: int  # in the log


class NatsTarget(Target[NatsSink]):
    """One connection to a server of the cluster."""

    extra: ClassVar[str | None] = "nats"
    remembers = True
    attribute_prefix: ClassVar[str | None] = "ce-"

    def __init__(self, sink: NatsSink, lane: Lane | None) -> None:
        super().__init__(sink, lane)
        self._connected: NatsClient | None = None
        self._stream = _Stream((), atomic=False, kept=True, largest=-1, first=0, last=0)
        self._last: int | None = None  # the sequence of the stream's last message
        self._place: _Place | None = None
        self._batches = 0
        self._name = secrets.token_hex(8)

    @classmethod
    def lanes(cls, sink: Any, partitions: int) -> int:
        """Return 1, because the order of the NATS stream is the order of the log."""
        return 1

    @property
    def _client(self) -> NatsClient:
        if self._connected is None:
            raise TargetAway("the NATS sink is not connected")
        return self._connected

    async def open(self) -> None:
        await self.close()
        self._connected = await self._connect()
        try:
            self._stream = await self._bounded(self._info())
            self._check_subjects()
        except BaseException:
            await self.close()
            raise

    def _check_subjects(self) -> None:
        name, taken, pattern = self.sink.stream, self._stream.subjects, pattern_of(self.sink.subject)
        if not any(overlap(pattern, subject) for subject in taken):
            raise Unusable(
                f"stream {name} takes the subjects {', '.join(taken) or 'none'}, and not {pattern}",
                hint=f"nats stream edit {name} --subjects '{','.join([*taken, pattern])}'",
            )

    async def _connect(self) -> NatsClient:
        context = None if self.sink.tls is None else client_context(self.sink.tls)
        secret = self.sink.credentials
        credentials = None if secret is None else secret.get_secret_value()
        away: TargetAway | None = None
        for url in random.sample(self.sink.servers, len(self.sink.servers)):
            limit = min(_CONNECT, self.sink.timeout)
            try:
                async with asyncio.timeout(limit):
                    return await NatsClient.connect(url, credentials, context)
            except TimeoutError:
                away = TargetAway(f"NATS at {url.rpartition('@')[2]} does not answer within {limit:g} s")
            except TargetAway as error:
                away = error
        raise away or TargetAway("sink.servers is empty")

    async def _bounded(self, call: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.timeout(self.sink.timeout):
                return await call
        except TimeoutError:
            raise TargetAway(f"NATS has not answered within {self.sink.timeout:g} s") from None

    async def _info(self) -> _Stream:
        name = self.sink.stream
        answer = await self._client.request(f"$JS.API.STREAM.INFO.{name}")
        if answer.refusal is not None:
            if answer.refusal.code == _NO_STREAM:
                create = f"nats stream add {name} --subjects '{pattern_of(self.sink.subject)}' --allow-batch --defaults"
                raise Unusable(f"there is no stream {name}", hint=create)
            raise TargetAway(f"NATS cannot describe stream {name}: {answer.refusal.text}")
        config, state = answer.data["config"], answer.data["state"]
        return _Stream(
            config.get("subjects") or (),
            bool(config.get("allow_atomic")),
            config["retention"] == "limits",
            config["max_msg_size"],
            state["first_seq"],
            state["last_seq"],
        )

    async def position(self) -> int | None:
        return None if self.lane is None else await self._look()

    async def _look(self) -> int | None:
        """Read the stream from its end, and return the seq of the lane's last message."""
        self._stream = await self._bounded(self._info())
        found = await self._newest(range(self._stream.last, max(self._stream.first, 1) - 1, -1))
        self._last = self._stream.last
        self._place = found
        if found is None:
            return None if self._stream.last else 0  # the stream may have dropped the lane's messages
        return found.seq

    async def _newest(self, numbers: range) -> _Place | None:
        """Return the first of these messages that belongs to the lane."""
        found, start, size = None, 0, 1  # the last message is very often one of ours
        while found is None and start < len(numbers):
            found = await self._bounded(self._first_of(numbers[start : start + size]))
            start, size = start + size, _WINDOW
        return found

    async def _first_of(self, numbers: Sequence[int]) -> _Place | None:
        """Read messages, each with a request of its own, and return the first one that belongs to the lane."""
        subject = f"$JS.API.STREAM.MSG.GET.{self.sink.stream}"
        answers = await self._client.publish([NatsMessage(subject, None, b'{"seq":%d}' % number) for number in numbers])
        for index, number in enumerate(numbers):
            refusal, data = answers[index]
            if refusal is None:
                headers = dict(_LINE.findall(base64.b64decode(data["message"].get("hdrs", ""))))
                if self.lane is not None and headers.get(b"cdcbridge-lane") == self.lane.name.encode():
                    return _Place(number, int(headers[b"cdcbridge-seq"]))
            elif refusal.code != _NO_MESSAGE:
                raise TargetAway(f"NATS cannot read stream {self.sink.stream}: {refusal.text}")
        return None

    async def deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        return await self._bounded(self._by_key(batch) if self.lane is None else self._in_order(batch))

    async def _in_order(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        if self._last is None:
            await self._look()
        heads = [self._head(message) for message in batch]
        failure, end = None, len(batch)
        for index, message in enumerate(batch):
            if failure := self._impossible(message, heads[index]):
                end = index
                break
        atomic = self._stream.atomic and self._stream.kept
        store = self._store_atomically if atomic else self._store_chained
        sent, size = 0, _LARGEST_ATOMIC
        while sent < end:
            part = slice(sent, min(end, sent + size))
            stored, refusal = await store(batch[part], heads[part])
            sent += stored
            size = min(_LARGEST_ATOMIC, 2 * size)
            if refusal is None:
                continue
            if refusal.code in _MOVED or refusal is _REPEATED:
                await self._look_again()
            # A smaller batch fits more easily between other writers, and one message alone shows why it is refused.
            halved = (part.stop - part.start) // 2
            if refusal.code in _MOVED or (atomic and halved):
                size = max(1, halved)
                continue
            failure, end = self._judged(refusal, batch[sent]), sent
        return {} if failure is None else {end: failure} | dict.fromkeys(range(end + 1, len(batch)), _WAITS)

    async def _look_again(self) -> None:
        """Read the messages that were written to the stream since our last one."""
        before, last = self._place, self._last or 0
        self._stream = await self._bounded(self._info())
        if await self._newest(range(self._stream.last, last, -1)) is None and (
            before is None or await self._newest(range(before.number, before.number - 1, -1)) == before
        ):
            self._last = max(last, self._stream.last)
            return
        found, seq = await self._look(), None if before is None else before.seq
        if found is not None and (seq is None or found > seq):
            raise Displaced(f"another process has delivered messages up to {found} to stream {self.sink.stream}")
        raise TargetAway(f"stream {self.sink.stream} has lost its messages after {found}, the last one was {seq}")

    async def _store_atomically(
        self, batch: Sequence[Outgoing], heads: Sequence[_Head]
    ) -> tuple[int, NatsError | None]:
        self._batches += 1
        name = f"{self._name}-{self._batches}"
        end = len(batch)
        first = {"Nats-Expected-Last-Sequence": str(self._last), "Nats-Expected-Stream": self.sink.stream}
        messages = [
            NatsMessage(
                message.destination,
                {
                    **head,
                    "Nats-Batch-Id": name,
                    "Nats-Batch-Sequence": str(number),
                    **(first if number == 1 else {}),
                    **(_COMMIT if number == end else {}),
                },
                message.body or b"",
                number == end,
            )
            for number, (message, head) in enumerate(zip(batch, heads, strict=True), 1)
        ]
        answer = (await self._client.publish(messages))[end - 1]
        if answer.refusal is None and not self._is_new(answer):
            return 0, _REPEATED
        if answer.refusal is not None:
            return 0, answer.refusal
        self._stored(answer, batch[-1])
        return end, None

    async def _store_chained(self, batch: Sequence[Outgoing], heads: Sequence[_Head]) -> tuple[int, NatsError | None]:
        place = {"Nats-Expected-Last-Sequence": str(self._last)}
        messages = []
        for message, head in zip(batch, heads, strict=True):
            messages.append(self._identified(message, {**head, **place}))
            place = {"Nats-Expected-Last-Msg-Id": message.id}
        answers = await self._client.publish(messages)
        for index, message in enumerate(batch):
            answer = answers[index]
            if answer.refusal is not None or not self._is_new(answer):
                return index, answer.refusal or _REPEATED
            self._stored(answer, message)
        return len(batch), None

    def _stored(self, answer: Answer, message: Outgoing) -> None:
        self._last = answer.data["seq"]
        self._place = _Place(self._last, message.seq)

    def _is_new(self, answer: Answer) -> bool:
        return answer.data.get("stream") == self.sink.stream and not answer.data.get("duplicate")

    async def _by_key(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        heads = [self._head(message) for message in batch]
        failures = {i: failure for i, message in enumerate(batch) if (failure := self._impossible(message, heads[i]))}
        failed = {batch[i].key for i in failures} - {None}
        pending = [i for i in range(len(batch)) if i not in failures]
        while pending:
            now, later, keys = [], [], set[str]()
            for index in pending:
                key = batch[index].key
                if key is not None and key in failed:
                    failures[index] = _WAITS
                elif key is not None and key in keys:
                    later.append(index)
                else:
                    now.append(index)
                    keys.update(() if key is None else (key,))
            answers = await self._client.publish([self._identified(batch[i], heads[i]) for i in now]) if now else {}
            for index, answer in zip(now, (answers[place] for place in range(len(now))), strict=True):
                if failure := await self._outcome(batch[index], answer):
                    failures[index] = failure
                    failed |= {batch[index].key} - {None}
            pending = later
        return failures

    async def _outcome(self, message: Outgoing, answer: Answer) -> Failure | None:
        if answer.refusal is not None:
            return self._judged(answer.refusal, message)
        if answer.data.get("duplicate"):
            number = answer.data["seq"]
            kept = await self._client.request(f"$JS.API.STREAM.MSG.GET.{self.sink.stream}", {"seq": number})
            if kept.refusal is None and kept.data["message"]["subject"] != message.destination:
                return Failure(f"{_REPEATED.text}: {message.id}, for example of another consumer")
        return None

    def _identified(self, message: Outgoing, head: _Head) -> NatsMessage:
        headers = {**head, "Nats-Msg-Id": message.id, "Nats-Expected-Stream": self.sink.stream}
        return NatsMessage(message.destination, headers, message.body or b"")

    def _head(self, message: Outgoing) -> _Head:
        head = dict(message.headers)
        text = "".join(head.values())
        if "\n" in text or "\r" in text:  # a key may contain a line break
            head = {name: " ".join(value.splitlines()) for name, value in head.items()}
        if self.lane is not None:
            head["cdcbridge-lane"] = self.lane.name
            head.setdefault("cdcbridge-seq", str(message.seq))
        return head

    def _impossible(self, message: Outgoing, head: _Head) -> Failure | None:
        """Return why a message must not be sent. The server would end the connection for it."""
        limit = self._client.max_payload
        size = len(message.body or b"") + sum(4 + len(name) + len(value.encode()) for name, value in head.items())
        if (size := size + _HEADERS) > limit:
            return Failure(
                f"the message has {size} bytes with its headers, and max_payload of the NATS server is {limit}",
                for_good=True,
            )
        if not valid(message.destination):
            return Failure(f"{message.destination!r} is not a subject of NATS", for_good=True)
        return None

    def _judged(self, refusal: NatsError, message: Outgoing) -> Failure:
        stream, text = self.sink.stream, refusal.text
        if refusal.code == _TOO_LARGE:
            size = len(message.body or b"")
            limit = self._stream.largest
            return Failure(
                f"{text}: the message has {size} bytes and headers, and stream {stream} takes {limit}", for_good=True
            )
        if (refusal.status, refusal.code) == (NO_RESPONDERS, 0):
            if any(overlap(message.destination, subject) for subject in self._stream.subjects):
                raise TargetAway(f"stream {stream} takes no messages at present, for example because it has no leader")
            return Failure(f"stream {stream} does not take the subject {message.destination}")
        if refusal.status == NO_RESPONDERS and "per subject" not in text:
            raise TargetAway(f"stream {stream} takes no messages at present: {text}")
        if refusal.code == _NOT_ATOMIC:
            raise TargetAway(f"stream {stream} has been changed: {text}")
        return Failure(f"NATS refuses the message: {text} (error {refusal.code or refusal.status})")

    async def close(self) -> None:
        client, self._connected = self._connected, None
        self._last = None
        if client is not None:
            await client.close()

    async def check(self) -> Sequence[Problem]:
        """Return the problems. Without atomic batches, the sink works more slowly."""
        if found := await super().check():
            return found
        name, stream = self.sink.stream, self._stream
        if self.lane is None or (stream.atomic and stream.kept):
            return []
        if not stream.kept:
            message = (
                "removes messages that were read, so that a repeated one is recognized in the duplicate window only"
            )
            fix = "Deliver to a stream whose retention is limits."
            return [Problem("sink_position", "warning", name, f"stream {name} {message}", fix)]
        message = f"stream {name} does not allow atomic batches, so that each message needs an answer of its own"
        return [Problem("sink_atomic", "warning", name, message, f"nats stream edit {name} --allow-batch --force")]
