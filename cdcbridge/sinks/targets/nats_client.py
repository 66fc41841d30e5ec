"""A connection to a NATS server: it publishes whole batches, and reads the answers from one inbox.

The protocol is described at https://docs.nats.io/reference/reference-protocols/nats-protocol. nats-py is not used,
because a sink needs three things that it does not offer. close() drops bytes that were not sent yet, so that nothing
is delivered after it. Credentials are sent over TLS alone if TLS was configured. A batch is one write, which needs a
third of the CPU time. Never reconnects and never sends anything twice.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import secrets
import ssl
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

import nkeys
import orjson

from cdcbridge.sinks.target import TargetAway, Unusable

_LOGIN_REFUSED: Final = re.compile(r"authorization|authentication|credentials", re.IGNORECASE)
_DENIED: Final = re.compile(r"Permissions Violation for Publish to \"(.+)\"", re.IGNORECASE)
_CREDS: Final = re.compile(r"-----BEGIN [^-]+-----\s*(\S+)\s*------END")
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
        headers: Lines of headers, each with its end of line.
        body: The content.
        answered: Whether the server is asked for an answer.
    """

    subject: str
    headers: str
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
        for index, asked in self._asked.items():
            if asked == subject and index not in self._answers:
                self.add(index, Answer(NatsError(403, 0, f"the user may not publish to {subject}"), {}))


class NatsClient(asyncio.Protocol):
    """One connection. connect() makes it.

    Attributes:
        max_payload: The largest message with its headers that the server takes, in bytes.
    """

    def __init__(self, address: str) -> None:
        loop = asyncio.get_running_loop()
        self._address = address
        self._inbox = f"_INBOX.{secrets.token_hex(8)}"
        self._numbers = 0
        self._buffer = b""
        self._info: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._waiting: dict[str, _Waiting] = {}
        self._lost: TargetAway | Unusable | None = None
        self._transport: asyncio.Transport | None = None
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
        host, port = parts.hostname or "localhost", parts.port or 4222
        address = f"{host}:{port}"
        if parts.scheme == "tls" and context is None:
            context = ssl.create_default_context()
        if credentials is None and parts.username:
            credentials = ":".join(unquote(text) for text in (parts.username, parts.password) if text is not None)
        client: NatsClient | None = None
        try:
            transport, client = await asyncio.get_running_loop().create_connection(lambda: cls(address), host, port)
            await client.greet(transport, host, credentials, context)
        except BaseException as error:
            if client is not None:
                client.close()
            if isinstance(error, ssl.SSLCertVerificationError):
                hint = "set sink.tls.ca to the authority that signed the server's certificate"
                raise Unusable(
                    f"the certificate of {address} is not trusted: {error.verify_message}", hint=hint
                ) from None
            if isinstance(error, OSError):
                raise TargetAway(f"cannot reach NATS at {address}: {error}") from None
            raise
        return client

    async def greet(
        self, transport: asyncio.Transport, host: str, credentials: str | None, context: ssl.SSLContext | None
    ) -> None:
        """Encrypt the connection, and log in. connect() describes the arguments and errors."""
        info = await self._info
        if context is None and info.get("tls_required"):
            context = ssl.create_default_context()
        if context is not None:
            if not (info.get("tls_required") or info.get("tls_available")):
                raise Unusable(f"{self._address} has no TLS, and sink.tls or a URL with tls:// asks for it")
            secured = await asyncio.get_running_loop().start_tls(transport, self, context, server_hostname=host)
            if secured is None:
                raise TargetAway(f"{self._address} closed the connection")
            self._transport = secured
        options = {
            "verbose": False, "pedantic": False, "lang": "python", "version": "1", "protocol": 1, "name": "cdcbridge",
            "headers": True, "no_responders": True, "tls_required": context is not None,
        }  # fmt: skip
        options |= _login(credentials, str(info.get("nonce", "")))
        self._write(f"CONNECT {json.dumps(options)}\r\nSUB {self._inbox}.* 1\r\nPING\r\n".encode())
        await self._ready

    def close(self) -> None:
        """Disconnect at once. Bytes that were not sent yet are dropped."""
        self._end(TargetAway(f"the connection to {self._address} was closed"))

    async def publish(self, messages: Sequence[NatsMessage]) -> dict[int, Answer]:
        """Publish messages, and return the answers by index.

        Raises:
            TargetAway: The connection ended.
        """
        waiting = _Waiting(messages)
        self._numbers += 1
        name = f"{self._inbox}.{self._numbers}"
        self._waiting[name] = waiting
        try:
            self._write(b"".join(_packed(messages, name)))
            return await waiting.done
        finally:
            del self._waiting[name]

    async def request(self, subject: str, content: Mapping[str, Any] | None = None) -> Answer:
        """Send a request to JetStream, and return its answer.

        Raises:
            TargetAway: The connection ended, or JetStream does not answer.
            Unusable: The user may not send the request.
        """
        body = b"" if content is None else orjson.dumps(content)
        answer = (await self.publish([NatsMessage(subject, "", body)]))[0]
        if answer.refusal is not None and answer.refusal.status == 403:
            raise Unusable(
                f"NATS refuses {subject}: {answer.refusal.text}", hint=f"grant the user publish to {subject}"
            )
        if answer.refusal is not None and answer.refusal.status == NO_RESPONDERS:
            reason = answer.refusal.text
            raise TargetAway(f"JetStream does not answer: {reason}", hint="is JetStream enabled in the NATS server?")
        return answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(TargetAway(f"the connection to NATS at {self._address} ended{f': {exc}' if exc else ''}"))

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data
        start = 0
        while (end := buffer.find(b"\r\n", start)) >= 0:
            line = buffer[start:end]
            start, last = end + 2, start
            if line.startswith((b"MSG ", b"HMSG ")):
                words = line.split()
                size = int(words[-1])
                if len(buffer) < start + size + 2:
                    start = last
                    break
                head = int(words[-2]) if words[0] == b"HMSG" else 0
                self._answered(words[1].decode(), buffer[start : start + head], buffer[start + head : start + size])
                start += size + 2
            else:
                self._control(line)
        self._buffer = buffer[start:]

    def _control(self, line: bytes) -> None:
        kind, _, rest = line.partition(b" ")
        match kind.upper():
            case b"PING":
                self._write(b"PONG\r\n")
            case b"PONG" if not self._ready.done():
                self._ready.set_result(None)
            case b"INFO":
                info = orjson.loads(rest)
                self.max_payload = info.get("max_payload", self.max_payload)
                if not self._info.done():
                    self._info.set_result(info)
            case b"-ERR":
                self._refused(rest.decode(errors="replace").strip(" '"))

    def _refused(self, reason: str) -> None:
        if denied := _DENIED.search(reason):
            for waiting in list(self._waiting.values()):
                waiting.deny(denied[1])
        elif _LOGIN_REFUSED.search(reason):
            self._end(Unusable(f"NATS at {self._address} refuses the user: {reason}", hint=_CREDENTIALS_HINT))
        else:
            self._end(TargetAway(f"NATS at {self._address} ended the connection: {reason}"))

    def _answered(self, subject: str, headers: bytes, body: bytes) -> None:
        name, _, index = subject.rpartition("-")
        waiting = self._waiting.get(name)
        if waiting is None:
            return
        if headers.startswith(b"NATS/1.0 "):
            status = int(headers[9:12])
            answer = Answer(NatsError(status, 0, "no stream takes the subject" if status == NO_RESPONDERS else ""), {})
        else:
            content = orjson.loads(body)
            error = content.get("error")
            refusal = error and NatsError(error.get("code", 0), error.get("err_code", 0), error.get("description", ""))
            answer = Answer(refusal, content)
        waiting.add(int(index), answer)

    def _end(self, error: TargetAway | Unusable) -> None:
        if self._lost is None:
            self._lost = error
        futures: list[asyncio.Future[Any]] = [self._info, self._ready]
        futures += (waiting.done for waiting in self._waiting.values())
        for future in futures:
            if not future.done():
                future.set_exception(self._lost)
                future.exception()  # the future of a handshake may have no reader
        if self._transport is not None:
            self._transport.abort()

    def _write(self, data: bytes) -> None:
        if self._lost is not None:
            raise self._lost
        if self._transport is not None:
            self._transport.write(data)


def _packed(messages: Sequence[NatsMessage], inbox: str) -> Iterable[bytes]:
    for index, (subject, headers, body, answered) in enumerate(messages):
        reply = f"{inbox}-{index} " if answered else ""
        if headers:
            head = f"NATS/1.0\r\n{headers}\r\n".encode()
            yield f"HPUB {subject} {reply}{len(head)} {len(head) + len(body)}\r\n".encode()
            yield head
        else:
            yield f"PUB {subject} {reply}{len(body)}\r\n".encode()
        yield body
        yield b"\r\n"


def _login(credentials: str | None, nonce: str) -> dict[str, str]:
    if credentials is None:
        return {}
    if credentials.endswith(".creds") or Path(credentials).is_file():
        try:
            jwt, seed = _CREDS.findall(Path(credentials).read_text())
            signed = nkeys.from_seed(bytearray(seed.encode())).sign(nonce.encode())
        except (OSError, ValueError, nkeys.NkeysError):
            raise Unusable(f"{credentials} is not a readable .creds file", hint=_CREDENTIALS_HINT) from None
        return {"jwt": jwt, "sig": base64.urlsafe_b64encode(signed).decode().rstrip("=")}
    user, colon, password = credentials.partition(":")
    return {"user": user, "pass": password} if colon else {"auth_token": credentials}
