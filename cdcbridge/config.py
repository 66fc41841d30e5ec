"""The configuration: one YAML file, environment variables over it. Every error names the file and the path in it.

Reads the file and the environment, nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from cdcbridge.config_errors import describe
from cdcbridge.config_file import checked_text, read
from cdcbridge.errors import ConfigError
from cdcbridge.filters import Filter, refuse_on_leave
from cdcbridge.patterns import refuse_bad_patterns
from cdcbridge.route import OPERATIONS
from cdcbridge.units import Duration, Size, format_duration

Operation = Literal["insert", "update", "delete", "truncate"]
_IDENTIFIER: Final = r"^[a-z_][a-z0-9_]{0,62}$"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Model):
    """The database whose changes are read."""

    dsn: SecretStr
    name: Annotated[str, Field(min_length=1)] | None = None  # in metrics; None: its host and database
    read_dsn: SecretStr | None = None  # where backfills read rows: a standby will do
    slot: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,63}$")] = "cdcbridge"
    plugin: Literal["auto", "pgoutput", "wal2json"] = "auto"
    publication: Annotated[str, Field(pattern=_IDENTIFIER)] = "cdcbridge"
    heartbeat_interval: Duration = 10.0
    max_retained_wal: Size = 10 << 30
    max_slot_inactive: Duration = 300.0
    failover: Literal["auto"] | bool = "auto"
    event_trigger: bool = False  # tables that are created later without a key get REPLICA IDENTITY FULL


class Store(_Model):
    """Where the log and the consumers' rows are kept; `dsn` None: the source."""

    dsn: SecretStr | None = None
    schema_: Annotated[str, Field(pattern=_IDENTIFIER, alias="schema")] = "cdcbridge"
    partitions: Annotated[int, Field(ge=1, le=4096)] = 16
    retention: Annotated[Duration, Field(gt=0)] = 7 * 86400.0
    retention_bytes: Annotated[Size, Field(gt=0)] | None = None
    max_retention: Duration = 30 * 86400.0

    @model_validator(mode="after")
    def _max_is_longer(self) -> Self:
        if self.max_retention < self.retention:
            raise ValueError("max_retention is shorter than retention")
        return self


class Log(_Model):
    """The program's own log, on stderr."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Http(_Model):
    """Where `run` answers /metrics, /live and /ready."""

    listen: Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:.]+\]|[^:\s]+):[0-9]{1,5}$")] = "127.0.0.1:9187"

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


class RetryDelay(_Model):
    """The delay of a nack that names none: min(max, initial × factor^(deliver_count − 1))."""

    initial: Duration = 1.0
    factor: Annotated[float, Field(ge=1, le=100)] = 2.0
    max: Duration = 600.0


class Columns(_Model):
    """Which columns receivers get: one of the two."""

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.include is None) == (self.exclude is None):
            raise ValueError("give either include or exclude")
        return self


class Consumer(_Model):
    """One consumer: what it wants, and how it is delivered."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]
    mode: Literal["queue", "fifo", "stream"] = "queue"
    tables: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    operations: tuple[Operation, ...] = OPERATIONS
    filter: str | None = None
    on_leave: Literal["none", "delete"] = "none"  # delete: a row that no longer matches the filter is delivered as one
    columns: Columns | None = None
    key: tuple[str, ...] | None = None
    start: Literal["now", "earliest", "snapshot"] = "now"
    visibility_timeout: Annotated[Duration, Field(gt=0)] = 30.0
    max_deliveries: Annotated[int, Field(ge=1, le=10_000)] = 5
    retry_delay: RetryDelay = RetryDelay()
    max_in_flight: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    max_message_bytes: Size = 1 << 20
    role: Annotated[str, Field(min_length=1, max_length=63)] | None = None
    compact: bool = False

    @field_validator("tables")
    @classmethod
    def _table_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        refuse_bad_patterns(value)
        return value

    @field_validator("topics")
    @classmethod
    def _published_topics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for topic in value:
            if not topic or "." in topic:
                raise ValueError(f"{topic!r} is not a topic; a published topic has a name without a dot")
        return value

    @field_validator("operations", "key")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not value:
            raise ValueError("must not be empty")
        return value

    @field_validator("filter")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                Filter(value)
            except ValueError as error:
                raise ValueError(f"not a CEL expression: {str(error).splitlines()[0]}") from None
        return value

    @model_validator(mode="after")
    def _wants_something(self) -> Self:
        if not (self.tables or self.topics):
            raise ValueError("a consumer needs tables or topics")
        if self.start == "snapshot" and not self.tables:
            raise ValueError("start: snapshot reads tables, and there are none; published topics have start: earliest")
        return self

    @model_validator(mode="after")
    def _reads_the_log_as_it_is(self) -> Self:
        given = [name for name in ("filter", "columns", "key") if getattr(self, name) is not None]
        if self.mode == "stream" and given:
            raise ValueError(f"a stream reads the log as it is: {' and '.join(given)} cannot be given")
        return self

    @model_validator(mode="after")
    def _knows_when_a_row_leaves(self) -> Self:
        if self.on_leave == "delete":
            refuse_on_leave(self.mode, self.filter, self.operations)
        return self

    @model_validator(mode="after")
    def _compacts_a_state(self) -> Self:
        if self.compact and self.mode != "stream":
            raise ValueError(f"compact is for mode stream, which reads the log; {self.mode} gets each message once")
        if self.compact and set(self.operations) != set(OPERATIONS):
            raise ValueError(f"compact keeps a table's state, which needs all operations: {', '.join(OPERATIONS)}")
        return self


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

    source: Source
    store: Store = Store()
    log: Log = Log()
    http: Http | None = Http()
    consumers: tuple[Consumer, ...] = ()
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
    def _no_wait_outlasts_the_log(self) -> Self:
        """A message that waits for longer than store.max_retention is a dead letter by then."""
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
        """The environment over the file, which comes as init arguments."""
        return (env_settings, init_settings)


def load(path: Path, environment: Mapping[str, str] = os.environ) -> Config:
    """Read the file, substitute `${VAR}` and `${VAR:-default}`, lay CDCBRIDGE_… variables over it, validate.

    Raises ConfigError with one line per problem: file, line, path in it, what was given, what is allowed.
    """
    file = read(path, environment)
    for name, value in os.environ.items():
        if name.startswith("CDCBRIDGE_") and name != "CDCBRIDGE_CONFIG":  # the name of a file may be any bytes
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
