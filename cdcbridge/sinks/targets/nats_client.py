"""A connection to a NATS server: it publishes whole batches, and reads the answers from one inbox.

nats-py (https://nats-io.github.io/nats.py/) connects, logs in, writes and parses. nats_wire.py is its transport. With
`pending_size=0` it never flushes in the middle of a batch, because that wait swallows a cancellation. With
`connect_timeout=None` it does not use asyncio.wait_for(), which can swallow one in Python 3.11.

Never reconnects and never sends anything twice.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

import nats.errors
import nkeys
import orjson
from nats.aio.client import Client, RawCredentials
from nats.aio.msg import Msg

from cdcbridge.errors import CdcbridgeError
from cdcbridge.sinks.target import TargetAway, Unusable
from cdcbridge.sinks.targets.nats_wire import NatsWire

_LOGIN_REFUSED: Final = re.compile(r"authorization|authentication|credentials", re.IGNORECASE)
_DENIED: Final = re.compile(r"permissions violation for publish to \"(.+)\"")  # the library makes it lower case
_CREDS: Final = ("BEGIN NATS USER JWT", "BEGIN USER NKEY SEED")  # the library would look for them for ever
_CREDENTIALS_HINT: Final = "correct sink.credentials, and the user's rights in the NATS server"
NO_RESPONDERS: Final = 503


class NatsError(NamedTuple):
    """An error with which the server answered.

    Attributes:
        status: A number like a status of HTTP, for example 503 if no stream takes the subject.
        code: JetStream's number of the error, for example 10071, or 0.
        text: The error in words.
    """

    status: int
    code: int
    text: str


class Answer(NamedTuple):
    """The server's answer to a message.

    Attributes:
        refusal: The error, or None.
        data: The content of the answer.
    """

    refusal: NatsError | None
    data: Mapping[str, Any]


class NatsMessage(NamedTuple):
    """A message to publish.

    Attributes:
        subject: The subject.
        headers: Names and values, or None.
        body: The content.
        answered: Whether the server is asked for an answer.
    """

    subject: str
    headers: dict[str, str] | None
    body: bytes
    answered: bool = True


class _Waiting:
    """The answers to messages that were published together."""

    def __init__(self, messages: Sequence[NatsMessage]) -> None:
        self._asked = {i: message.subject for i, message in enumerate(messages) if message.answered}
        self.done: asyncio.Future[dict[int, Answer]] = asyncio.get_running_loop().create_future()
        self._answers: dict[int, Answer] = {}

    def add(self, index: int, answer: Answer) -> None:
        self._answers[index] = answer
        if len(self._answers) == len(self._asked) and not self.done.done():
            self.done.set_result(self._answers)

    def deny(self, subject: str) -> None:
        """Answer for the server that the user may not publish to a subject, which is in lower case."""
        found = {index: asked for index, asked in self._asked.items() if asked.lower() == subject}
        if len(set(found.values())) == 1:  # else it is not known which one the server means
            for index in found.keys() - self._answers.keys():
                self.add(index, Answer(NatsError(403, 0, f"the user may not publish to {found[index]}"), {}))


class NatsClient:
    """One connection. connect() makes it.

    Attributes:
        max_payload: The largest message with its headers that the server takes, in bytes.
    """

    def __init__(self, address: str, wire: NatsWire) -> None:
        self._address = address
        self._wire = wire
        self._client = Client()
        self._client._transport = wire  # noqa: SLF001 - the library has no other way to give one
        self._inbox = self._client.new_inbox()
        self._numbers = 0
        self._waiting: dict[str, _Waiting] = {}
        self._reported: Exception | None = None
        self._lost: CdcbridgeError | None = None
        self.max_payload = 1 << 20

    @classmethod
    async def connect(cls, url: str, credentials: str | None, context: ssl.SSLContext | None) -> NatsClient:
        """Connect to one server.

        Args:
            url: For example `nats://host:4222`. With `tls://`, the server must speak TLS.
            credentials: A token, `user:password`, the path of a .creds file, or None.
            context: How the connection is encrypted. None: only if the server or the URL wants it.

        Raises:
            TargetAway: The server cannot be reached.
            Unusable: The server refuses the credentials, or has no TLS.
        """
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        host, place = parts.hostname or "localhost", parts.netloc.rpartition("@")[2]
        if parts.scheme == "tls" and context is None:
            context = ssl.create_default_context()
        if credentials is None and parts.username:
            credentials = ":".join(unquote(text) for text in (parts.username, parts.password) if text is not None)
        login = _login(credentials)
        made = cls(place if parts.port else f"{place}:4222", NatsWire(host, context))
        try:
            await made._open(login if context is None else login | {"tls": context})
        except (OSError, nats.errors.Error, nkeys.NkeysError) as error:
            await made.close()
            raise made._failure(error) from None
        except BaseException:
            await made.close()
            raise
        return made

    async def _open(self, login: dict[str, Any]) -> None:
        login |= {"connect_timeout": None, "reconnect_time_wait": 0, "max_reconnect_attempts": 1}  # 0 would be for ever
        await self._client.connect(
            f"nats://{self._address}",
            name="cdcbridge",
            allow_reconnect=False,
            pending_size=0,
            error_cb=self._told,
            closed_cb=self._closed,
            **login,
        )
        if not self._client.is_connected:
            raise ConnectionError("the server closed the connection")
        self.max_payload = self._client.max_payload
        await self._client.subscribe(f"{self._inbox}.*", cb=self._answered)

    def _failure(self, error: Exception) -> CdcbridgeError:
        """Return the error for a connection that could not be made."""
        if isinstance(error, ssl.SSLCertVerificationError):
            hint = "set sink.tls.ca to the authority that signed the server's certificate"
            return Unusable(f"the certificate of {self._address} is not trusted: {error.verify_message}", hint=hint)
        if isinstance(error, nats.errors.SecureConnWantedError):
            return Unusable(f"{self._address} has no TLS, and sink.tls or a URL with tls:// asks for it")
        if isinstance(error, nkeys.NkeysError):
            return Unusable(f"the seed in the .creds file is not valid: {error}", hint=_CREDENTIALS_HINT)
        if isinstance(error, nats.errors.NoServersError):
            return TargetAway(f"cannot reach NATS at {self._address}: {self._reported}")
        return self._ended(error)

    def _ended(self, error: Exception | None) -> CdcbridgeError:
        """Return the error for a connection that the server, the network or the library ended."""
        reason = str(error).removeprefix("nats: ").strip("'")
        if _LOGIN_REFUSED.search(reason):
            return Unusable(f"NATS at {self._address} refuses the user: {reason}", hint=_CREDENTIALS_HINT)
        return TargetAway(f"the connection to NATS at {self._address} ended: {reason}")

    async def close(self) -> None:
        """Disconnect at once. Bytes that were not sent yet are dropped."""
        self._wire.end()
        self._end(TargetAway(f"the connection to {self._address} was closed"))
        if self._client.is_connected:
            await self._client.close()

    async def publish(self, messages: Sequence[NatsMessage]) -> dict[int, Answer]:
        """Publish messages, and return the answers by index.

        Raises:
            TargetAway: The connection ended.
        """
        waiting = _Waiting(messages)
        self._numbers += 1
        name = f"{self._inbox}.{self._numbers}"
        self._waiting[name] = waiting
        publish = self._client.publish
        try:
            for index, (subject, headers, body, answered) in enumerate(messages):
                await publish(subject, body, f"{name}-{index}" if answered else "", headers)  # never suspends
            return await waiting.done
        except nats.errors.Error as error:
            raise self._lost or self._ended(error) from None
        finally:
            del self._waiting[name]

    async def request(self, subject: str, content: Mapping[str, Any] | None = None) -> Answer:
        """Send a request to JetStream, and return its answer.

        Raises:
            TargetAway: The connection ended, or JetStream does not answer.
            Unusable: The user may not send the request.
        """
        body = b"" if content is None else orjson.dumps(content)
        answer = (await self.publish([NatsMessage(subject, None, body)]))[0]
        if answer.refusal is not None and answer.refusal.status == 403:
            raise Unusable(
                f"NATS refuses {subject}: {answer.refusal.text}", hint=f"grant the user publish to {subject}"
            )
        if answer.refusal is not None and answer.refusal.status == NO_RESPONDERS:
            reason = answer.refusal.text
            raise TargetAway(f"JetStream does not answer: {reason}", hint="is JetStream enabled in the NATS server?")
        return answer

    async def _answered(self, message: Msg) -> None:
        name, _, index = message.subject.rpartition("-")
        waiting = self._waiting.get(name)
        if waiting is None:
            return
        if status := int((message.headers or {}).get("Status", 0)):
            text = "no stream takes the subject" if status == NO_RESPONDERS else ""
            waiting.add(int(index), Answer(NatsError(status, 0, text), {}))
            return
        content = orjson.loads(message.data)
        error = content.get("error")
        refusal = error and NatsError(error.get("code", 0), error.get("err_code", 0), error.get("description", ""))
        waiting.add(int(index), Answer(refusal, content))

    async def _told(self, error: Exception) -> None:
        """Take an error that the library reports beside the calls, for example that the user lacks a right."""
        self._reported = error
        if denied := _DENIED.search(str(error)):
            for waiting in list(self._waiting.values()):
                waiting.deny(denied[1])
        elif "permissions violation" in str(error):
            self._end(self._ended(error))

    async def _closed(self) -> None:
        self._end(self._ended(self._client.last_error))

    def _end(self, error: CdcbridgeError) -> None:
        """Let everything that waits for an answer fail."""
        self._lost = self._lost or error
        for waiting in self._waiting.values():
            if not waiting.done.done():
                waiting.done.set_exception(self._lost)


def _login(credentials: str | None) -> dict[str, Any]:
    """Return the arguments of the library's connect() for credentials.

    Raises:
        Unusable: The .creds file cannot be read.
    """
    if credentials is None:
        return {}
    if credentials.endswith(".creds") or Path(credentials).is_file():
        try:
            text = Path(credentials).read_text()
        except (OSError, ValueError):
            text = ""
        if not all(mark in text for mark in _CREDS):
            raise Unusable(f"{credentials} is not a readable .creds file", hint=_CREDENTIALS_HINT)
        return {"user_credentials": RawCredentials(text)}
    user, colon, password = credentials.partition(":")
    return {"user": user, "password": password} if colon else {"token": credentials}
