"""Read the configuration: one YAML file, and environment variables that override it.

Every error names the file and the path of the key in it. This package never accesses a database.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import (
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from cdcbridge.config.alerts import Alerts
from cdcbridge.config.consumer import Consumer
from cdcbridge.config.file import checked_text, read
from cdcbridge.config.mirror import Mirror, MirrorConsumer, consumer_of
from cdcbridge.config.problems import describe
from cdcbridge.config.sink_base import Model
from cdcbridge.config.web import Api, Http
from cdcbridge.errors import ConfigError
from cdcbridge.schemas import INTERNAL
from cdcbridge.units import Duration, Size, format_duration

__all__ = ["Alerts", "Api", "Config", "Consumer", "Http", "Log", "Mirror", "Source", "Store", "load"]
_IDENTIFIER: Final = r"^[a-z_][a-z0-9_]{0,62}$"
_SCHEMA: Final = r"^[a-z_][a-z0-9_]{0,53}$"  # the internal schema has a longer name (schemas.py), of 63 at most


class Source(Model):
    """The database whose changes are read."""

    dsn: Annotated[
        SecretStr,
        Field(
            description="The database whose changes are read. Required. Put a password into a variable.",
            examples=["${DATABASE_URL}"],
        ),
    ]
    name: Annotated[
        Annotated[str, Field(min_length=1)] | None,
        Field(
            description="The name of this source in metrics and alarms. Without it, its host and database.",
            examples=["shop"],
        ),
    ] = None
    read_dsn: Annotated[
        SecretStr | None,
        Field(
            description="The database that backfills read rows from, for example a standby. Without it, `dsn`.",
            examples=["${STANDBY_URL}"],
        ),
    ] = None
    slot: Annotated[
        str,
        Field(pattern=r"^[a-z0-9_]{1,63}$"),
        Field(description="The replication slot. The first `run` creates it.", examples=["cdcbridge"]),
    ] = "cdcbridge"
    plugin: Annotated[
        Literal["auto", "pgoutput", "wal2json"],
        Field(
            description="The output plugin of the slot. With `auto` an existing slot decides. A new one gets "
            "wal2json if that is version 2.6 or newer and the database is UTF8, and pgoutput otherwise.",
            examples=["pgoutput"],
        ),
    ] = "auto"
    publication: Annotated[
        str,
        Field(pattern=_IDENTIFIER),
        Field(
            description="The publication, for pgoutput only. `run` keeps it in step with the consumers' tables.",
            examples=["cdcbridge"],
        ),
    ] = "cdcbridge"
    heartbeat_interval: Annotated[
        Duration,
        Field(
            description="How often the bridge writes a small message into the WAL, so that the slot advances while "
            "only other databases write.",
            examples=["10s"],
        ),
    ] = 10.0
    max_retained_wal: Annotated[
        Size, Field(description="An alarm begins when the slot retains more WAL than this.", examples=["10GB"])
    ] = 10 << 30
    max_slot_inactive: Annotated[
        Duration,
        Field(description="An alarm begins when no bridge has read the slot for longer than this.", examples=["5m"]),
    ] = 300.0
    failover: Annotated[
        Literal["auto"] | bool,
        Field(
            description="If true, standby servers keep the slot, too (PostgreSQL 17 and newer). With `auto` they do"
            " where "
            "the server can.",
            examples=["true"],
        ),
    ] = "auto"
    event_trigger: Annotated[
        bool,
        Field(
            description="With true, a table that is created later without a key gets REPLICA IDENTITY FULL. The "
            "bridge's role must be a superuser.",
            examples=["true"],
        ),
    ] = False


class Store(Model):
    """Where the log and the consumers' rows are kept; `dsn` None: the source."""

    dsn: Annotated[
        SecretStr | None,
        Field(
            description="The database of the log and the queues. It may be on another server. Without it, "
            "`source.dsn`.",
            examples=["${STORE_URL}"],
        ),
    ] = None
    schema_: Annotated[
        str,
        Field(pattern=_SCHEMA, alias="schema"),
        Field(
            description="The schema of the log and the queues. One schema serves one source. Tables and functions"
            " that only the bridge uses are in a second schema, whose name ends with `_internal`.",
            examples=["cdcbridge"],
        ),
    ] = "cdcbridge"
    partitions: Annotated[
        int,
        Field(ge=1, le=4096),
        Field(
            description="How many partitions the log has, for stream consumers. A message's partition is crc32(key)"
            " % partitions.",
            examples=["16"],
        ),
    ] = 16
    retention: Annotated[
        Duration,
        Field(gt=0),
        Field(
            description="Segments of the log that are older than this are dropped once every queue and fifo consumer "
            "has finished them.",
            examples=["7d"],
        ),
    ] = 7 * 86400.0
    retention_bytes: Annotated[
        Annotated[Size, Field(gt=0)] | None,
        Field(
            description="The oldest segments are dropped as well while the log is larger than this. Without it, "
            "size does not matter.",
            examples=["100GB"],
        ),
    ] = None
    max_retention: Annotated[
        Duration,
        Field(
            description="Messages that are unfinished after this time become dead letters. It cannot be shorter "
            "than `retention`.",
            examples=["30d"],
        ),
    ] = 30 * 86400.0
    audit_retention: Annotated[
        Duration,
        Field(gt=0),
        Field(
            description="How long the audit log of the dashboard and of the HTTP API is kept. The bridge deletes older"
            " rows.",
            examples=["90d"],
        ),
    ] = 365 * 86400.0

    @field_validator("schema_")
    @classmethod
    def _is_not_internal(cls, value: str) -> str:
        if value.endswith(INTERNAL):
            raise ValueError(f"must not end with {INTERNAL}: such a schema belongs to the store of the name before it")
        return value

    @model_validator(mode="after")
    def _max_is_longer(self) -> Self:
        if self.max_retention < self.retention:
            raise ValueError("max_retention is shorter than retention")
        return self


class Log(Model):
    """The program's own log, on stderr."""

    format: Annotated[
        Literal["text", "json"],
        Field(
            description="The form of the program's own log on stderr: `text` is for people, `json` for programs.",
            examples=["json"],
        ),
    ] = "text"
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(description="The lowest level that is logged.", examples=["debug"]),
    ] = "info"


class Config(BaseSettings):
    """The whole file. `path` is where it was read from."""

    model_config = SettingsConfigDict(
        env_prefix="CDCBRIDGE_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        env_ignore_empty=True,
        validate_default=False,
    )

    source: Annotated[
        Source,
        Field(
            description="The database whose changes are read, and its replication slot.",
            examples=['{dsn: "${DATABASE_URL}"}'],
        ),
    ]
    store: Annotated[
        Store,
        Field(description="The database and the schema of the log and the queues.", examples=["{schema: cdcbridge}"]),
    ] = Store()
    log: Annotated[Log, Field(description="The program's own log.", examples=["{format: json}"])] = Log()
    http: Annotated[
        Http | None,
        Field(
            description="The endpoint of `run` for /metrics, /live and /ready. With null there is none.",
            examples=["{listen: 127.0.0.1:9187}"],
        ),
    ] = Http()
    api: Annotated[
        Api,
        Field(
            description="The HTTP API of `serve`, and who may call it.",
            examples=['{tokens: [{name: ops, token: "${OPS_TOKEN}", role: admin}]}'],
        ),
    ] = Api()
    alerts: Annotated[
        Alerts | None,
        Field(
            description="Messages to people when something is wrong. Without it, there are none.",
            examples=['{to: [{name: team, urls: ["${SLACK_URL}"]}]}'],
        ),
    ] = None
    consumers: Annotated[
        tuple[Consumer, ...],
        Field(
            description="The consumers, with the messages that each one takes and the way to deliver them.",
            examples=["[{name: billing, tables: [public.orders]}]"],
        ),
    ] = ()
    mirrors: Annotated[
        tuple[Mirror, ...],
        Field(
            description="Other PostgreSQL databases to which changes are applied. See docs/MIRRORS.md.",
            examples=['[{name: to_b, target: {dsn: "${B_DSN}"}, tables: ["public.*"]}]'],
        ),
    ] = ()
    _path: Path = PrivateAttr(default=Path("cdcbridge.yaml"))

    @property
    def source_dsn(self) -> str:
        return self.source.dsn.get_secret_value()

    @property
    def read_dsn(self) -> str:
        return self.source_dsn if self.source.read_dsn is None else self.source.read_dsn.get_secret_value()

    @property
    def store_dsn(self) -> str:
        return self.source_dsn if self.store.dsn is None else self.store.dsn.get_secret_value()

    @property
    def path(self) -> Path:
        return self._path

    @field_validator("consumers")
    @classmethod
    def _unique_names(cls, value: tuple[Consumer, ...]) -> tuple[Consumer, ...]:
        seen: set[str] = set()
        for consumer in value:
            if consumer.name in seen:
                raise ValueError(f"two consumers are named {consumer.name!r}")
            seen.add(consumer.name)
        return value

    @model_validator(mode="after")
    def _a_mirror_reads_as_a_consumer(self) -> Self:
        """Add a consumer for each mirror, so that all code that serves consumers serves mirrors as well."""
        written = tuple(one for one in self.consumers if not isinstance(one, MirrorConsumer))
        taken = {consumer.name for consumer in written}
        for mirror in self.mirrors:
            if mirror.name in taken:
                raise ValueError(f"the mirror {mirror.name!r} has the name of a consumer or of another mirror")
            taken.add(mirror.name)
        two_way = [mirror.name for mirror in self.mirrors if mirror.two_way is not None]
        if len(two_way) > 1:
            raise ValueError(
                f"the mirrors {' and '.join(two_way)} have two_way, but a database can have one peer. Three sides that "
                "write cannot agree by the rules of two (docs/TWO_WAY.md)"
            )
        self.__dict__["consumers"] = (*written, *map(consumer_of, self.mirrors))  # the model is frozen
        return self

    @model_validator(mode="after")
    def _tokens_name_consumers(self) -> Self:
        known = {consumer.name for consumer in self.consumers}
        for token in self.api.tokens:
            for name in token.consumers:
                if name not in known:
                    raise ValueError(f"api.tokens: the token {token.name!r} lists {name!r}, which is not a consumer")
        return self

    @model_validator(mode="after")
    def _rules_name_consumers(self) -> Self:
        known = {consumer.name for consumer in self.consumers}
        for rule, settings in self.alerts.rules.active() if self.alerts else ():
            for name in getattr(settings, "consumers", ()):
                if name not in known:
                    raise ValueError(f"alerts.rules.{rule} lists {name!r}, which is not a consumer")
        return self

    @model_validator(mode="after")
    def _no_wait_outlasts_the_log(self) -> Self:
        """Refuse waiting times above store.max_retention: by then the message is a dead letter.

        Only times that are set are checked, not defaults.
        """
        most = self.store.max_retention
        for consumer in self.consumers:
            delay = consumer.retry_delay
            given = [
                ("visibility_timeout", consumer.visibility_timeout)
                for _ in consumer.model_fields_set & {"visibility_timeout"}
            ]
            written = sorted(delay.model_fields_set & {"initial", "max"})
            given += [(f"retry_delay.{name}", getattr(delay, name)) for name in written]
            for name, value in given:
                if value > most:
                    raise ValueError(
                        f"consumer {consumer.name!r}: {name} is {format_duration(value)}, longer than"
                        f" store.max_retention, {format_duration(most)}"
                    )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources of values. The environment overrides the file, whose values are the init arguments."""
        return (env_settings, init_settings)


def load(path: Path, environment: Mapping[str, str] = os.environ) -> Config:
    """Return the validated configuration.

    `${VAR}` and `${VAR:-default}` in the file are replaced by environment variables. CDCBRIDGE_… variables of the
    process override keys of the file, for example CDCBRIDGE_SOURCE__SLOT overrides `source.slot`.

    Args:
        path: The configuration file.
        environment: The variables that `${VAR}` can name.

    Raises:
        ConfigError: The file cannot be read or is not valid. The message has one line per problem: the file, the line,
            the path in the file, the given value, and the allowed values.
    """
    file = read(path, environment)
    for name, value in os.environ.items():
        if name.startswith("CDCBRIDGE_") and name != "CDCBRIDGE_CONFIG":  # a file name may contain any bytes
            checked_text(value, f"{path}: the environment variable {name}")
    try:
        config = Config(**file.values)
    except SettingsError as error:
        raise ConfigError(
            f"{path}: the environment: {error}", hint="A list or a mapping in a variable is JSON."
        ) from None
    except ValidationError as error:
        raise ConfigError("\n".join(describe(file, Config, error.errors(include_url=False)))) from None
    config._path = path  # noqa: SLF001 - where the file's values came from is not one of them
    return config
