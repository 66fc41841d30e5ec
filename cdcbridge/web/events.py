"""The endpoint of server-sent events: the messages of a consumer, each as an event, until the caller disconnects.

A queue or fifo consumer delivers its messages: each event has a receipt, which the caller acks in another request. A
stream is followed in order of seq, and none of its offsets moves. The id of an event is the seq, so a caller that
returns with `Last-Event-ID` continues a stream after that message. An event `position` tells it where it is before the
first message, and after many messages of other consumers.

Messages are claimed in small batches, and only after the caller has read the earlier ones. Never keeps a message that
was not sent: it is given back.

Source: WHATWG HTML, section 9.2, "Server-sent events".
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Annotated, Any, Final, NamedTuple, Protocol

import orjson
import structlog
from pydantic import Field
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cdcbridge.errors import CdcbridgeError, StoreUnavailable
from cdcbridge.web.calls import Body, Call, Endpoint, Gone, Seconds, Services, within
from cdcbridge.web.problems import RequestRefused, problem_of
from cdcbridge.web.queues import DUE, GIVE_BACK

_KEEP_ALIVE: Final = 15.0  # seconds without an event, after which a comment is sent
_RETRY: Final = 2.0  # seconds between two looks while the store is away
_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
)
_CLAIM: Final = within(
    "receive(%s, %s::int, make_interval(secs => %s), durable => false)",
    "r.receipt, r.seq, extract(epoch from r.not_visible_until - clock_timestamp())::float8 as seconds",
)
_FOLLOW: Final = within("follow_stream(%s, %s, %s, %s::int)", "r.seq, r.topic")
# Nobody notifies of the end of a transaction that held messages back.
_HELD: Final = (
    "select c.id, case when pg_sequence_last_value('messages_seq') > %s and not c.paused then 1.0 end::float8"
    " from show_consumer(%s) c"
)
_SIGN: Final = b":\n"  # a comment
_LINE_ENDS: Final = re.compile(r"\r\n|\r|\n")
log = structlog.get_logger()


class EventsRequest(Body):
    """How many messages are claimed together, and for how long. For a stream, where to begin without Last-Event-ID."""

    max_messages: Annotated[int, Field(ge=1, le=100)] = 10
    visibility_timeout: Seconds | None = None
    place: Annotated[str, Field(alias="from")] = "latest"


class Event(NamedTuple):
    """A message to send, or a position.

    Attributes:
        seq: The id of the event.
        document: The message as JSON, or None for an event `position`.
        receipt: Its receipt, or None in a stream.
        until: The time of the event loop at which the delivery ends.
    """

    seq: int
    document: str | None
    receipt: str | None = None
    until: float = math.inf

    def text(self) -> bytes:
        """Return the event as bytes. JSON can have line ends between its values, and each line is a field."""
        if self.document is None:
            return b'event: position\nid: %d\ndata: {"seq":%d}\n\n' % (self.seq, self.seq)
        lines = "".join(f"data: {line}\n" for line in _LINE_ENDS.split(self.document))
        return f"id: {self.seq}\n{lines}\n".encode()


class EventSource(Protocol):
    """The messages of one caller."""

    async def next(self, gone: Gone) -> list[Event]:
        """Return the next messages, or [] after a time without any."""

    async def give_back(self, events: Collection[Event]) -> None:
        """Take back messages that were not sent."""

    def sign(self) -> bytes:
        """Return the sign of life for a caller without messages. It tells a new position."""


class Deliveries:
    """The messages of a queue or fifo consumer, each claimed for the caller."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._name = call.path["name"]

    async def next(self, gone: Gone) -> list[Event]:
        body: EventsRequest = self._call.body
        most = self._call.services.config.api.max_answer
        values = (most, self._name, body.max_messages, body.visibility_timeout)
        rows = await self._call.poll(_CLAIM, values, DUE, wait=_KEEP_ALIVE, gone=gone)
        await self._return([row[1] for row in rows if row[0] is None])
        now = asyncio.get_running_loop().time()
        return [Event(seq, text, receipt, now + left) for text, receipt, seq, left in rows if text is not None]

    async def give_back(self, events: Collection[Event]) -> None:
        await self._return([event.receipt for event in events if event.receipt is not None])

    async def _return(self, receipts: list[str]) -> None:
        if receipts:
            await self._call.store.patiently(GIVE_BACK, (self._name, receipts))

    def sign(self) -> bytes:
        return _SIGN


class Followed:
    """The messages of a stream after a position, for one of its followers.

    Args:
        call: The request.
        after: The seq after which to continue, or None to begin at the place that the request names.
    """

    def __init__(self, call: Call, after: int | None) -> None:
        self._call = call
        self._name = call.path["name"]
        self._after = after
        self._told: int | None = None

    async def begin(self) -> None:
        """Find the position.

        Raises:
            CdcbridgeError: The caller cannot continue there, for example because retention dropped messages (CB009).
        """
        _, seq, topic = (await self._rows(1))[0]
        self._after = seq if topic is None else seq - 1

    async def _rows(self, most: int) -> list[tuple[Any, ...]]:
        values = (self._call.services.config.api.max_answer, self._name, self._after, self._call.body.place, most)
        return await self._call.store.rows(_FOLLOW, values)

    async def _look(self) -> list[Event]:
        """Return the messages after the position, and move it."""
        rows = await self._rows(self._call.body.max_messages)
        found = [Event(seq, text) for text, seq, topic in rows if topic is not None and text is not None]
        whole = len(found) == len(rows) - 1
        self._after = rows[-1][1] if whole else found[-1].seq
        return found

    async def next(self, gone: Gone) -> list[Event]:
        async def look() -> list[Event]:
            before = self._after
            found = await self._look()
            if found or self._after == before:
                return found
            # Told at once: the caller continues here even if it disconnects before the next message.
            self._told = self._after
            return [Event(self._after or 0, None)]

        async def due() -> tuple[int, float | None]:
            row = (await self._call.store.rows(_HELD, (self._after, self._name)))[0]
            return row[0], row[1]

        return await self._call.services.arrivals.poll(self._name, _KEEP_ALIVE, look, due, gone, together=True)

    async def give_back(self, events: Collection[Event]) -> None:
        """Do nothing: no message was taken."""

    def sign(self) -> bytes:
        if self._told == self._after:
            return _SIGN
        self._told = self._after
        return Event(self._after or 0, None).text()


class _Gone(Exception):
    """The caller has disconnected."""


class EventStream(Response):
    """The answer, which ends when the caller disconnects or the process is asked to end.

    Args:
        source: The messages.
        services: The settings, the store and the open streams.
        name: The name of the consumer, for the log.
    """

    def __init__(self, source: EventSource, services: Services, name: str) -> None:
        super().__init__()
        self._source = source
        self._services = services
        self._name = name
        self._sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        began = asyncio.get_running_loop().time()
        gone = asyncio.create_task(_disconnect(receive))

        async def write(text: bytes) -> None:
            await send({"type": "http.response.body", "body": text, "more_body": True})
            await asyncio.sleep(0)  # `gone` gets its turn: send() does not tell, and may never wait
            if gone.done():
                raise _Gone

        self._services.event_streams.add(self)
        try:
            with suppress(_Gone):
                await self._run(write, gone)
                await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            self._services.event_streams.discard(self)
            seconds = round(asyncio.get_running_loop().time() - began, 1)
            log.info("api.events_ended", consumer=self._name, sent=self._sent, seconds=seconds)

    async def _run(self, write: Callable[[bytes], Awaitable[None]], gone: asyncio.Task[None]) -> None:
        async def is_gone() -> bool:
            return gone.done()

        await write(self._source.sign())
        while not self._services.arrivals.stopping:
            await write(b"")  # returns when the caller has read most of the earlier events
            try:
                events = await self._source.next(is_gone)
                await self._send(events, write)
            except StoreUnavailable as error:
                await write(_SIGN)
                log.debug("api.events_wait", consumer=self._name, error=str(error))
                with suppress(TimeoutError):
                    async with asyncio.timeout(_RETRY):
                        await self._services.arrivals.stopped.wait()
            except CdcbridgeError as error:
                problem = orjson.dumps(problem_of(error)[1])
                await write(b"event: problem\ndata: " + problem + b"\n\n")
                return
            else:
                if not events:
                    await write(self._source.sign())

    async def _send(self, events: list[Event], write: Callable[[bytes], Awaitable[None]]) -> None:
        """Send the events. Those that the caller did not get are given back."""
        loop = asyncio.get_running_loop()
        unsent = deque(events)
        try:
            while unsent and not self._services.arrivals.stopping and loop.time() < unsent[0].until:
                await write(unsent[0].text())
                self._sent += unsent.popleft().document is not None
        finally:
            if unsent:
                await self._source.give_back(unsent)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def events(call: Call) -> Response:
    """Send the messages of a consumer as server-sent events."""
    name, services = call.path["name"], call.services
    mode = await call.store.value("select mode from show_consumer(%s)", (name,))
    source: EventSource = Deliveries(call)
    if mode == "stream":
        followed = Followed(call, _last_id(call))
        await followed.begin()
        source = followed
    if len(services.event_streams) >= services.config.api.event_streams:
        raise RequestRefused(503, "no more event streams are allowed, because as many as `api.event_streams` are open",
                      hint="Start another `serve`, or raise the limit.", headers={"Retry-After": "5"})  # fmt: skip
    return EventStream(source, services, name)


def _last_id(call: Call) -> int | None:
    given = call.headers.get("last-event-id", "")
    if given and not re.fullmatch(r"[0-9]{1,18}", given):
        raise RequestRefused(422, f"the header Last-Event-ID is {given!r}, and not a seq")
    return int(given) if given else None


ENDPOINTS = (
    Endpoint(
        "GET",
        "/api/consumers/{name}/events",
        "deliver",
        {},
        events,
        EventsRequest,
        "text/event-stream",
    ),
)
