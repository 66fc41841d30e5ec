"""Describe the addresses on which `run` and `serve` answer HTTP, and the callers of the API.

This module never opens a socket.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from cdcbridge.config.sink_base import Mask, Model
from cdcbridge.units import Size

HostAndPort = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:.]+\]|[^:\s]+):[0-9]{1,5}$")]
Role = Literal["admin", "operator", "consumer", "viewer"]


class Listening(Model):
    """An address on which a process listens."""

    listen: HostAndPort

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)

    @field_validator("listen")
    @classmethod
    def _port_exists(cls, value: str) -> str:
        if int(value.rpartition(":")[2]) > 65535:
            raise ValueError("a port is at most 65535")
        return value


class Http(Listening):
    """Where `run` answers /metrics, /live and /ready."""

    listen: Annotated[
        HostAndPort,
        Field(
            description="The address of `run` for /metrics, /live and /ready, as host:port.", examples=["0.0.0.0:9187"]
        ),
    ] = "127.0.0.1:9187"


class ServerTls(Model):
    """The certificate of the API."""

    cert: Annotated[
        Path, Field(description="A file with the certificate and its chain.", examples=["/etc/cdcbridge/api.pem"])
    ]
    key: Annotated[Path, Field(description="A file with the key.", examples=["/etc/cdcbridge/api.key"])]


class ApiToken(Model):
    """A caller of the API."""

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9_.-]{1,63}$"),
        Field(description="The name of the caller in the log.", examples=["ops"]),
    ]
    token: Annotated[
        SecretStr,
        Field(min_length=1),
        Field(description="The secret that the caller sends as a bearer token. Put it into a variable.",
              examples=["${OPS_TOKEN}"]),
    ]  # fmt: skip
    role: Annotated[
        Role,
        Field(
            description="`viewer` reads. `operator` also pauses, resumes and redrives. `consumer` receives, acks and"
            " publishes for the consumers that it lists. `admin` may do everything.",
            examples=["admin"],
        ),
    ]
    consumers: Annotated[
        tuple[str, ...],
        Field(description="The consumers of a token with the role `consumer`.", examples=["[billing]"]),
    ] = ()

    @model_validator(mode="after")
    def _only_consumers_list_consumers(self) -> Self:
        if self.role == "consumer" and not self.consumers:
            raise ValueError("a token with the role consumer lists its consumers, for example consumers: [billing]")
        if self.role != "consumer" and self.consumers:
            raise ValueError(f"the role {self.role} has all consumers: remove `consumers`, or use the role consumer")
        return self


class AccessKey(Model):
    """A key with which clients of the SQS endpoint sign their requests."""

    id: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9_-]{1,128}$"),
        Field(description="The access key id that the client is configured with.", examples=["AKIABILLING"]),
    ]
    secret: Annotated[
        SecretStr,
        Field(min_length=1),
        Field(description="The secret access key. Put it into a variable.", examples=["${SQS_SECRET}"]),
    ]
    token: Annotated[
        str,
        Field(
            description="The name of a token of `api.tokens`. Its role and consumers apply to the key.",
            examples=["billing"],
        ),
    ]


class SqsEndpoint(Model):
    """The SQS endpoint of `serve`."""

    access_keys: Annotated[
        tuple[AccessKey, ...],
        Field(min_length=1),
        Field(
            description="The keys of the clients.",
            examples=['[{id: AKIABILLING, secret: "${SQS_SECRET}", token: billing}]'],
        ),
    ]

    @model_validator(mode="after")
    def _ids_differ(self) -> Self:
        if len({key.id for key in self.access_keys}) < len(self.access_keys):
            raise ValueError("two access keys have the same id")
        return self


class Api(Listening):
    """The HTTP API of `serve`."""

    listen: Annotated[
        HostAndPort,
        Field(
            description="The address of `serve`, as host:port. Without tokens, only a loopback address is allowed.",
            examples=["0.0.0.0:9188"],
        ),
    ] = "127.0.0.1:9188"
    tls: Annotated[
        ServerTls | None,
        Field(
            description="The certificate for HTTPS. Without it, `serve` answers HTTP, for example behind a proxy.",
            examples=["{cert: /etc/cdcbridge/api.pem, key: /etc/cdcbridge/api.key}"],
        ),
    ] = None
    tokens: Annotated[
        tuple[ApiToken, ...],
        Field(
            description="The callers. Without tokens, each caller may do everything.",
            examples=['[{name: ops, token: "${OPS_TOKEN}", role: admin}]'],
        ),
    ] = ()
    sqs: Annotated[
        SqsEndpoint | None,
        Field(
            description="The keys of clients of SQS. Without it, there is no SQS endpoint.",
            examples=['{access_keys: [{id: AKIABILLING, secret: "${SQS_SECRET}", token: billing}]}'],
        ),
    ] = None
    connections: Annotated[
        int,
        Field(ge=1, le=1000),
        Field(description="How many sessions on the store a process opens at most.", examples=["20"]),
    ] = 10
    browse: Annotated[
        bool | tuple[Role, ...],
        Field(
            description="Who sees the data of messages in the dashboard: everybody, with false nobody, or the listed"
            " roles.",
            examples=["[admin, operator]"],
        ),
    ] = True
    mask: Annotated[
        Mask,
        Field(
            description="Columns whose values the dashboard hides, as `mask` of a sink does.",
            examples=["{email: hash, phone: last4}"],
        ),
    ] = {}  # noqa: RUF012 - pydantic copies it
    max_body: Annotated[
        Size, Field(gt=0), Field(description="A larger request is refused with 413.", examples=["64MB"])
    ] = 16 << 20
    max_answer: Annotated[
        Size,
        Field(gt=0),
        Field(
            description="An answer has fewer messages than the caller asked for, if these would be larger together. The"
            " others stay in the queue. One message is always whole.",
            examples=["64MB"],
        ),
    ] = 16 << 20
    event_streams: Annotated[
        int,
        Field(ge=0),
        Field(description="How many streams of server-sent events a process keeps open at most.", examples=["1000"]),
    ] = 100

    def shows_data(self, role: Role) -> bool:
        """Return whether callers with this role see the data of messages in the dashboard."""
        return self.browse if isinstance(self.browse, bool) else role in self.browse

    @model_validator(mode="after")
    def _is_protected(self) -> Self:
        if not self.tokens and not is_loopback(self.address[0]):
            raise ValueError(f"listen is {self.listen}, which others can reach: give `tokens`, or listen on 127.0.0.1")
        for what in ("name", "token"):
            values = [getattr(token, what) for token in self.tokens]
            if len(set(values)) < len(values):
                raise ValueError(f"two tokens have the same {what}")
        for key in () if self.sqs is None else self.sqs.access_keys:
            if key.token not in {token.name for token in self.tokens}:
                raise ValueError(f"the access key {key.id!r} names the token {key.token!r}, which is not in `tokens`")
        return self


def is_loopback(host: str) -> bool:
    """Return whether only programs on this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
