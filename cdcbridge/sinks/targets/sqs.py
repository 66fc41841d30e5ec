"""Deliver messages to a queue of Amazon SQS (docs/sinks/sqs.md).

SQS cannot say which message it has last. A FIFO queue drops a message that it has seen within 5 minutes, by its
`MessageDeduplicationId`, so that a message is there once unless it was sent again later than that. Its `MessageGroupId`
is the key, so that the messages of a key are in order. A standard queue gets each message at least once, in any order.

Up to 16 requests with up to 10 messages each are in progress at a time. An entry of a request can fail alone, so a FIFO
queue gets at most one message of a key in each request. Never sends a message of a key before the one before it was
accepted, and never lets the client library try again by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore import exceptions
from botocore.loaders import create_loader

from cdcbridge.config.sink import SqsSink
from cdcbridge.sinks.target import Failure, Lane, Outgoing, Target, TargetAway, Unusable
from cdcbridge.sinks.targets.hold_back import WAITS

_AT_ONCE: Final = 16  # requests
_ENTRIES: Final = 10  # of a request
_MOST_BYTES: Final = 1 << 20  # of a request
_ATTRIBUTES: Final = 10  # of a message
_SHOWN: Final = 200  # characters of an answer
_PLAIN: Final = re.compile(r"[!-~]{1,128}")  # what an id or a group of a FIFO queue may be
_CONTROL: Final = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")
_REGION: Final = re.compile(r"sqs(?:-fips)?\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?")
_DESCRIPTIONS: Final = create_loader()  # of SQS and its endpoints, which take 50 ms to read
_MISSING: Final = frozenset({"QueueDoesNotExist", "NonExistentQueue", "QueueDeletedRecently"})
_DENIED: Final = re.compile(
    r"InvalidClientTokenId|UnrecognizedClient|ExpiredToken|RequestExpired|SignatureDoesNotMatch|AccessDenied"
    r"|InvalidSecurity|MissingAuthenticationToken|IncompleteSignature|AuthFailure|InvalidAccessKeyId|OptInRequired"
)
_BUSY: Final = re.compile(r"Throttl|TooManyRequests|OverLimit|ServiceUnavailable|InternalFailure|InternalError")
_CREDENTIALS: Final = (
    exceptions.NoCredentialsError,
    exceptions.PartialCredentialsError,
    exceptions.CredentialRetrievalError,
    exceptions.TokenRetrievalError,
    exceptions.UnauthorizedSSOTokenError,
    exceptions.ProfileNotFound,
)


class Entry(NamedTuple):
    """A message that is ready to be sent.

    Attributes:
        number: The index in the batch.
        key: The messages of one key are sent one after the other.
        size: The bytes that SQS counts.
        fields: The entry of the request, without its Id.
    """

    number: int
    key: str | int
    size: int
    fields: dict[str, Any]


class SqsTarget(Target[SqsSink]):
    """A client of one queue, for a lane or for all claims."""

    extra = "sqs"

    def __init__(self, sink: SqsSink, lane: Lane | None) -> None:
        super().__init__(sink, lane)
        self.is_fifo = sink.queue_url.endswith(".fifo")
        self.largest = _MOST_BYTES  # bytes of a message, until the queue says so
        self._client: Any = None
        self._stack = AsyncExitStack()
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def open(self) -> None:
        """Make a client, and ask the queue for the largest message that it takes."""
        region = _REGION.fullmatch(urlsplit(self.sink.queue_url).hostname or "")
        timeout = self.sink.timeout
        config = AioConfig(
            connect_timeout=timeout,
            read_timeout=timeout,
            max_pool_connections=_AT_ONCE,
            retries={"total_max_attempts": 1},
        )
        try:
            session = get_session()
            session.register_component("data_loader", _DESCRIPTIONS)
            made = session.create_client(
                "sqs",
                region_name=self.sink.region or (region and region[1]),
                endpoint_url=self.sink.endpoint_url,
                config=config,
            )
            self._client = await self._stack.enter_async_context(made)
        except (exceptions.BotoCoreError, ValueError) as error:
            raise self._named(error) from None
        try:
            found = await self._call("get_queue_attributes", AttributeNames=["MaximumMessageSize"])
        except exceptions.ClientError as error:
            raise Unusable(f"{self.sink.queue_url}: {_text(error)}", hint="change `queue_url` of the sink") from None
        self.largest = int(found.get("Attributes", {}).get("MaximumMessageSize", self.largest))

    async def deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        """Send the batch, and return the messages that SQS did not accept."""
        return await QueueDelivery(self, batch).run()

    async def close(self) -> None:
        """Close all connections."""
        self._client = None
        await self._stack.aclose()

    async def send(self, entries: Sequence[Entry]) -> list[Failure | None]:
        """Send one request, and return what became of each entry.

        Raises:
            TargetAway: SQS did not answer, or is busy.
            Unusable: The queue is missing, or the credentials are refused.
        """
        listed = [{"Id": str(number), **entry.fields} for number, entry in enumerate(entries)]
        try:
            async with self._slots:
                answer = await self._call("send_message_batch", Entries=listed)
        except exceptions.ClientError as error:
            if len(entries) == 1:
                return [Failure(_text(error), for_good=True)]
            # The request as a whole was refused, for example as too large. One of the entries may be the reason.
            half = len(entries) // 2
            return [*await self.send(entries[:half]), *await self.send(entries[half:])]
        unknown = Failure("SQS did not say what became of it")
        results: list[Failure | None] = [unknown] * len(entries)
        for accepted in answer.get("Successful", []):
            results[int(accepted["Id"])] = None
        for failed in answer.get("Failed", []):
            reason = f"SQS: {failed.get('Code')}: {str(failed.get('Message', ''))[:_SHOWN]}"
            busy = _BUSY.search(str(failed.get("Code")))
            results[int(failed["Id"])] = Failure(reason, for_good=bool(failed.get("SenderFault")) and busy is None)
        return results

    async def _call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Call the client.

        Raises:
            ClientError: SQS refused the request itself.
            TargetAway: SQS did not answer, or is busy.
            Unusable: The queue is missing, or the credentials are refused.
        """
        if self._client is None:
            raise TargetAway(f"the sink of {self.sink.queue_url} is closed")
        try:
            async with asyncio.timeout(self.sink.timeout):
                found: dict[str, Any] = await getattr(self._client, name)(QueueUrl=self.sink.queue_url, **arguments)
        except TimeoutError:
            message = f"{self.sink.queue_url} did not answer within {self.sink.timeout:g} s (`timeout`)"
            raise TargetAway(message) from None
        except exceptions.ClientError as error:
            named = self._refused(error)
            if named is None:
                raise
            raise named from None
        except (exceptions.BotoCoreError, OSError, ValueError) as error:
            raise self._named(error) from None
        return found

    def _refused(self, error: exceptions.ClientError) -> TargetAway | Unusable | None:
        """Return the error of an answer that is about the queue or the credentials, and not about a message."""
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        message = f"{self.sink.queue_url}: {_text(error)}"
        if code.rpartition(".")[2] in _MISSING:
            name = self.sink.queue_url.rpartition("/")[2]
            fifo = " --attributes FifoQueue=true" if self.is_fifo else ""
            return Unusable(message, hint=f"aws sqs create-queue --queue-name {name}{fifo}")
        if _BUSY.search(code) or status >= 500 or status == 429:
            return TargetAway(message)
        if _DENIED.search(code) or status in {401, 403}:
            return Unusable(message, hint=_credentials_hint(self.sink.queue_url))
        return None

    def _named(self, error: Exception) -> TargetAway | Unusable:
        """Return the error of a client that got no answer."""
        message = f"{self.sink.queue_url}: {' '.join(str(error).split())[:_SHOWN]}"
        if isinstance(error, _CREDENTIALS):
            return Unusable(message, hint=_credentials_hint(self.sink.queue_url))
        if isinstance(error, exceptions.NoRegionError | exceptions.InvalidRegionError):
            return Unusable(message, hint="set `region` of the sink, for example eu-central-1")
        if isinstance(error, exceptions.SSLError):
            return Unusable(message, hint="name the authority's certificate in the variable AWS_CA_BUNDLE")
        if isinstance(error, ValueError) and not isinstance(error, exceptions.BotoCoreError):
            return Unusable(message, hint="change `endpoint_url` or `queue_url` of the sink")
        return TargetAway(message)


class QueueDelivery:
    """One batch on its way to the queue.

    Args:
        target: The open target.
        batch: The messages.
    """

    def __init__(self, target: SqsTarget, batch: Sequence[Outgoing]) -> None:
        self._target = target
        self._failures: dict[int, Failure] = {}
        self._waiting: dict[str | int, deque[Entry]] = {}  # by key; a key in progress is not in _ready
        self._ready: deque[str | int] = deque()
        self._delivered = False
        self._stop: TargetAway | Unusable | None = None  # nothing is sent after it
        for index, message in enumerate(batch):
            # A tombstone is not sent, because nothing compacts a queue.
            if message.body is not None:
                entry = entry_of(index, message, message.body, fifo=target.is_fifo)
                self._waiting.setdefault(entry.key, deque()).append(entry)
        self._ready.extend(self._waiting)

    async def run(self) -> Mapping[int, Failure]:
        """Send everything, and return what was not accepted, by the index in the batch."""
        running: set[asyncio.Task[None]] = set()
        try:
            while running or self._ready:
                while self._ready and self._stop is None and len(running) < _AT_ONCE:
                    if entries := self._take():
                        running.add(asyncio.create_task(self._send(entries)))
                if not running:
                    break
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if self._stop is not None:
            if isinstance(self._stop, Unusable) or not self._delivered:
                raise self._stop
            for key in list(self._waiting):
                self._fail_rest(key, Failure(f"not sent: {self._stop}"))
        return self._failures

    def _take(self) -> list[Entry]:
        """Return the first messages of keys that are ready, as many as fit into one request."""
        entries: list[Entry] = []
        size = 0
        while self._ready and len(entries) < _ENTRIES:
            key = self._ready[0]
            entry = self._waiting[key][0]
            if entry.size > self._target.largest:
                reason = f"it has {entry.size} bytes, and the queue takes {self._target.largest} (MaximumMessageSize)"
                self._ready.popleft()
                self._waiting[key].popleft()
                self._failures[entry.number] = Failure(reason, for_good=True)
                self._fail_rest(key, WAITS)
                continue
            if entries and size + entry.size > _MOST_BYTES:
                break
            self._ready.popleft()
            entries.append(entry)
            size += entry.size
        return entries

    async def _send(self, entries: Sequence[Entry]) -> None:
        try:
            results = await self._target.send(entries)
        except (TargetAway, Unusable) as error:
            if self._stop is None or isinstance(error, Unusable):
                self._stop = error
            return  # the entries stay in _waiting
        for entry, failure in zip(entries, results, strict=True):
            waiting = self._waiting[entry.key]
            waiting.popleft()
            if failure is not None:
                self._failures[entry.number] = failure
                self._fail_rest(entry.key, WAITS)
            else:
                self._delivered = True
                if waiting:
                    self._ready.append(entry.key)
                else:
                    del self._waiting[entry.key]

    def _fail_rest(self, key: str | int, failure: Failure) -> None:
        """Give up the waiting messages of a key."""
        for entry in self._waiting.pop(key, ()):
            self._failures[entry.number] = failure


def entry_of(index: int, message: Outgoing, body: bytes, *, fifo: bool) -> Entry:
    """Return a message as an entry of a request.

    Args:
        index: The place in the batch.
        message: The message.
        body: Its content.
        fifo: Whether the queue is a FIFO queue.
    """
    text = body.decode()
    if "\ufffe" in text or "\uffff" in text:  # SQS refuses them, and they are allowed in the strings of JSON
        text = text.replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")
    size = len(body)
    attributes: dict[str, dict[str, str]] = {}
    for name, value in message.headers.items():
        if value and (len(attributes) < _ATTRIBUTES or name == "cdcbridge-id"):
            if len(attributes) == _ATTRIBUTES:
                attributes.popitem()
            attributes[name] = {"DataType": "String", "StringValue": _CONTROL.sub("\ufffd", value)}
    size += sum(len(name) + len("String") + len(one["StringValue"].encode()) for name, one in attributes.items())
    fields: dict[str, Any] = {"MessageBody": text}
    if attributes:
        fields["MessageAttributes"] = attributes
    if not fifo:
        return Entry(index, index, size, fields)
    key = message.id if message.key is None else message.key
    fields["MessageGroupId"] = plain(key)
    fields["MessageDeduplicationId"] = plain(message.id)
    return Entry(index, fields["MessageGroupId"], size, fields)


def plain(text: str) -> str:
    """Return a text as SQS takes it as an id or a group: at most 128 printable characters, or its SHA-256."""
    return text if _PLAIN.fullmatch(text) else hashlib.sha256(text.encode()).hexdigest()


def _text(error: exceptions.ClientError) -> str:
    found = error.response.get("Error", {})
    return f"SQS: {found.get('Code')}: {' '.join(str(found.get('Message', '')).split())[:_SHOWN]}"


def _credentials_hint(queue: str) -> str:
    return (
        f"give cdcbridge credentials of AWS that may do sqs:SendMessage and sqs:GetQueueAttributes on {queue}, "
        "for example in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )
