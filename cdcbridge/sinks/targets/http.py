"""Deliver messages to a webhook by POST requests, as Standard Webhooks describes (docs/sinks/http.md).

A webhook cannot say which message it has last, so each message arrives at least once. The header `webhook-id` is the
same at each attempt. Up to 32 requests are in progress at a time, in a lane as well as for claims. The messages of one
key are sent one after the other, and none of them overtakes one that failed. With `batch`, one request has many
messages. If the webhook refuses such a request for good, its halves are sent, until the refused message is found.

A message fails alone, as long as the webhook takes others. If it takes none, it is away. Never follows a redirect, and
never uses a proxy of the environment. Never repeats a secret in an error.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, TypeAlias

import aiohttp
from yarl import URL

from cdcbridge import __version__
from cdcbridge.config.sink import HttpSink
from cdcbridge.problem import Problem
from cdcbridge.sinks.target import Failure, Lane, Outgoing, Target, TargetAway, TargetGone, Unusable
from cdcbridge.sinks.targets import http_answer
from cdcbridge.sinks.targets.hold_back import WAITS
from cdcbridge.sinks.targets.http_answer import Answer
from cdcbridge.sinks.targets.tls import client_context, untrusted

_AT_ONCE: Final = 32  # requests
_MOST: Final = 1 << 20  # bytes of an answer that are read
_AWAY: Final = frozenset({429, 502, 503, 504})  # answers that are about the webhook, and not about a message
Group: TypeAlias = list[tuple[int, Outgoing]]
_TYPES: Final = {  # by format: the content type of one message, and of a batch
    "cdcbridge": ("application/json", "application/json"),
    "debezium": ("application/json", "application/json"),
    "cloudevents": ("application/cloudevents+json", "application/cloudevents-batch+json"),
}


class HttpTarget(Target[HttpSink]):
    """The connections of a lane, or of all claims, to a webhook."""

    extra = "webhook"
    attribute_prefix = "ce-"

    def __init__(self, sink: HttpSink, lane: Lane | None) -> None:
        super().__init__(sink, lane)
        url = sink.url.get_secret_value()
        self._origin = http_answer.origin(url)
        self._address = http_answer.addresses(url)
        self.has_one_address = "{" not in url
        given = [value.get_secret_value() for value in sink.headers.values()]
        signing = [] if sink.secret is None else [sink.secret.get_secret_value()]
        self._mask = http_answer.masker([*given, *signing, *http_answer.secrets_in(url)])
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._key: bytes | None = None
        self._headers: dict[str, str] = {}
        # In a batch, the webhook must find the id of each message, to name it in `failed`.
        self._has_ids = sink.format in {"cdcbridge", "cloudevents"} and sink.transform is None

    async def open(self) -> None:
        """Read the certificates and the secret. Sends no request."""
        if self.sink.secret is not None:
            try:
                self._key = http_answer.signing_key(self.sink.secret.get_secret_value())
            except ValueError as error:
                raise Unusable(
                    f"`secret` of the sink cannot sign: {error}",
                    hint='echo "whsec_$(openssl rand -base64 24)" makes a secret',
                ) from None
        binary = self.sink.format == "cloudevents" and self.sink.content_mode == "binary"
        if binary and self.sink.batch is not None:
            raise Unusable("CloudEvents in binary mode cannot be sent in a batch", hint="remove `batch` of the sink")
        given = {name.lower(): value.get_secret_value() for name, value in self.sink.headers.items()}
        for name, value in given.items():
            if "\r" in value or "\n" in value or "\0" in value or not name.isascii():
                raise Unusable(f"`headers` of the sink has a {name} with a line break", hint="write it in one line")
        kind = _TYPES[self.sink.format][self.sink.batch is not None]
        if binary or self.sink.transform is not None:
            kind = "application/json"
        self._headers = {"content-type": kind, **given}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_AT_ONCE, ssl=client_context(self.sink.tls)),
            timeout=aiohttp.ClientTimeout(total=self.sink.timeout),
            headers={"user-agent": f"cdcbridge/{__version__}", "accept-encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )

    async def deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        """Send the batch, and return what the webhook did not accept."""
        return await Delivery(self, batch).run()

    async def close(self) -> None:
        """Close all connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def check(self) -> Sequence[Problem]:
        """Send a HEAD request, which changes nothing, and look at its answer. Any status but 401 and 410 will do."""
        url = self.sink.url.get_secret_value()
        try:
            await self.open()
            answer = await self.request("HEAD", URL(self._origin if "{" in url else url), b"", self._headers)
            if (about := self.about_the_sink(answer)) is not None:
                raise about
        except (TargetAway, TargetGone, Unusable) as error:
            code = "sink_unreachable" if isinstance(error, TargetAway) else "sink_unusable"
            return [Problem(code, "error", self.sink.type, str(error), error.hint or "")]
        finally:
            await self.close()
        return []

    def about_the_sink(self, answer: Answer) -> TargetGone | Unusable | None:
        """Return the error of an answer that is about the sink, and after which nothing more is sent."""
        reason = self.answered(self.failure(answer))
        if answer.status == 410:
            return TargetGone(f"{reason}; it wants no more messages", hint="change `url` of the sink")
        if answer.status == 401:
            return Unusable(reason, hint="change `headers` or `secret` of the sink")
        return None

    def failure(self, answer: Answer) -> Failure:
        """Return what an answer other than 2xx means for a message, without secrets."""
        return http_answer.failure(answer, self._mask)

    def answered(self, failure: Failure) -> str:
        """Return the sentence that names the webhook and its answer."""
        return f"{self._origin} answered {failure.reason}"

    async def post(self, messages: Sequence[Outgoing]) -> Answer:
        """Send messages of one destination in one request.

        Raises:
            TargetAway: No answer has arrived.
            Unusable: The certificate of the webhook is not trusted, for example.
        """
        first, last = messages[0], messages[-1]
        address = self._address(first.destination)
        if address is None:
            return Answer(400, None, None, b"not sent: a placeholder of `url` has the value . or ..")
        headers = self._headers
        if self.sink.batch is None:
            one, body = first.id, first.body or b""
            described = {name: http_answer.header_value(value) for name, value in first.headers.items()}
            headers = {"content-type": headers["content-type"], **described, **headers}
        else:
            one = f"{first.id}:{last.id}:{len(messages)}"
            body = b"[%s]" % b",".join(self._elements(messages))
        timestamp = str(int(time.time()))
        headers = {**headers, "webhook-id": one, "webhook-timestamp": timestamp}
        if self._key is not None:
            headers["webhook-signature"] = http_answer.signature(self._key, one, timestamp, body)
        async with self._slots:
            return await self.request("POST", self._url(address), body, headers)

    async def request(self, method: str, url: URL, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Send a request and return the answer.

        Raises:
            TargetAway: No answer has arrived.
            Unusable: The certificate of the webhook is not trusted, for example.
        """
        if self._session is None:
            raise TargetAway(f"the sink of {self._origin} is closed")
        try:
            async with self._session.request(
                method, url, data=body, headers=headers, allow_redirects=False
            ) as response:
                found = response.headers
                text = await _beginning(response)
                return Answer(response.status, found.get("retry-after"), found.get("location"), text)
        except aiohttp.ClientConnectorCertificateError as error:
            raise untrusted(self._origin, error.certificate_error) from None
        except TimeoutError:
            raise TargetAway(f"{self._origin} did not answer within {self.sink.timeout:g} s (`timeout`)") from None
        except aiohttp.InvalidURL:
            raise Unusable(f"`url` of the sink is not an address of {self._origin}", hint="change `url`") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
            raise TargetAway(f"{self._origin}: {self._mask(str(reason)) or type(reason).__name__}") from None

    def _elements(self, messages: Sequence[Outgoing]) -> list[bytes]:
        if self._has_ids:
            return [one.body or b"null" for one in messages]
        wrapped = b'{"id":%s,"seq":%d,"data":%s}'
        return [wrapped % (json.dumps(one.id).encode(), one.seq, one.body or b"null") for one in messages]

    def _url(self, address: str) -> URL:
        try:
            return URL(address)
        except ValueError:
            raise Unusable(f"`url` of the sink is not an address of {self._origin}", hint="change `url`") from None


class Delivery:
    """One batch on its way to the webhook.

    Args:
        target: The open target.
        batch: The messages.
    """

    def __init__(self, target: HttpTarget, batch: Sequence[Outgoing]) -> None:
        self._target = target
        # A tombstone is not sent, because nothing compacts a webhook.
        self._batch: Group = [(index, message) for index, message in enumerate(batch) if message.body is not None]
        self._failures: dict[int, Failure] = {}
        self._failed_keys: set[str] = set()
        self._is_away = True  # no answer so far was about a message
        self._stop: TargetAway | TargetGone | Unusable | None = None  # nothing is sent after it

    async def run(self) -> Mapping[int, Failure]:
        """Send everything, and return what the webhook did not accept, by the index in the batch."""
        for chains in self._rounds():
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(len(chains), _AT_ONCE)):
                    tasks.create_task(self._work(chains))
        if self._stop is not None and (self._is_away or not isinstance(self._stop, TargetAway)):
            raise self._stop
        return self._failures

    def _rounds(self) -> Iterator[deque[list[Group]]]:
        """Yield chains of groups. Chains are sent at the same time, and the groups of one chain one by one.

        A group is the messages of one request. A round begins when the one before has ended.
        """
        if self._target.sink.batch is None:
            keys: dict[str | int, list[Group]] = {}
            for index, message in self._batch:
                keys.setdefault(index if message.key is None else message.key, []).append([(index, message)])
            yield deque(keys.values())
            return
        if self._target.has_one_address:
            yield deque([[self._batch]] if self._batch else [])
            return
        groups: dict[str, Group] = {}
        destinations: dict[str, str] = {}  # by key: a key with two destinations needs two rounds
        for index, message in self._batch:
            if message.key is not None and destinations.get(message.key, message.destination) != message.destination:
                yield deque([group] for group in groups.values())
                groups, destinations = {}, {}
            if message.key is not None:
                destinations[message.key] = message.destination
            groups.setdefault(message.destination, []).append((index, message))
        yield deque([group] for group in groups.values())

    async def _work(self, chains: deque[list[Group]]) -> None:
        while chains:
            for group in chains.popleft():
                await self._send(group)

    async def _send(self, group: Group) -> None:
        ready = group
        if self._failed_keys:
            ready = [one for one in group if one[1].key not in self._failed_keys]
            self._failures.update({one[0]: WAITS for one in group if one[1].key in self._failed_keys})
        if self._stop is not None:
            self._fail(ready, Failure(f"not sent: {self._stop}", retry_after=self._retry_after()))
        elif ready:
            try:
                await self._judge(ready, await self._target.post([message for _, message in ready]))
            except (TargetAway, Unusable) as error:
                self._stop_for(error)
                self._fail(ready, Failure(str(error)))

    async def _judge(self, group: Group, answer: Answer) -> None:
        if http_answer.is_delivered(answer):
            self._accept(group, answer)
            return
        failure = self._target.failure(answer)
        if (about := self._target.about_the_sink(answer)) is not None:
            self._stop_for(about)
        elif answer.status in _AWAY:
            self._stop_for(TargetAway(self._target.answered(failure), retry_after=failure.retry_after))
        elif failure.for_good and len(group) > 1 and answer.status >= 400:
            await self._send(group[: len(group) // 2])
            await self._send(group[len(group) // 2 :])
            return
        else:
            self._is_away = False
        self._fail(group, failure)

    def _accept(self, group: Group, answer: Answer) -> None:
        self._is_away = False
        if self._target.sink.batch is None:
            return
        failed = http_answer.failed_ids(answer.body, [message.id for _, message in group])
        if isinstance(failed, str):
            self._fail(group, Failure(failed))
        elif failed:
            named = [(index, message) for index, message in group if message.id in failed]
            self._fail(named, Failure("the webhook's answer lists it in `failed`"))

    def _fail(self, group: Group, failure: Failure) -> None:
        for index, message in group:
            self._failures[index] = failure
            if message.key is not None:
                self._failed_keys.add(message.key)

    def _stop_for(self, error: TargetAway | TargetGone | Unusable) -> None:
        """Send nothing after this error. An error about the sink counts more than one that may pass."""
        if self._stop is None or isinstance(self._stop, TargetAway):
            self._stop = error

    def _retry_after(self) -> float | None:
        return self._stop.retry_after if isinstance(self._stop, TargetAway) else None


async def _beginning(response: aiohttp.ClientResponse) -> bytes:
    """Read the body of an answer up to a limit. The connection is closed if there is more."""
    parts, size = [], 0
    while size < _MOST and (part := await response.content.readany()):
        parts.append(part)
        size += len(part)
    return b"".join(parts)
