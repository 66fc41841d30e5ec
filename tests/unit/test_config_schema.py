"""The JSON schema of the configuration accepts what the program accepts, and refuses what an editor can see is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fastjsonschema
import pytest
import yaml
from pydantic import BaseModel

from cdcbridge.cli.schema import file_schema
from cdcbridge.config import Config, load
from cdcbridge.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "config" / "cdcbridge.example.yaml"
VALIDATE = fastjsonschema.compile(file_schema())
VALUES = {"DATABASE_URL": "host=x", "N": "16", "D": "30s", "S": "1MB", "B": "true", "F": "2.5", "MODE": "fifo"}
HEAD = "source: {dsn: host=x}\n"


def both(tmp_path: Path, text: str) -> tuple[bool, bool]:
    """Whether the schema accepts the file, and whether the program does."""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    try:
        load(path, VALUES)
        program = True
    except ConfigError:
        program = False
    try:
        VALIDATE(yaml.safe_load(text))
        schema = True
    except fastjsonschema.JsonSchemaValueException:
        schema = False
    return schema, program


def consumer(settings: str) -> str:
    return f"{HEAD}consumers: [{{name: c, tables: [public.t], {settings}}}]"


GOOD = [
    HEAD,
    "source: {dsn: '${DATABASE_URL}', read_dsn: null, slot: '${X:-mine}', failover: true, event_trigger: '${B}'}",
    "source: {dsn: host=x, plugin: '${X:-auto}', publication: '${X:-p}', failover: '${B}', max_retained_wal: '${S}'}",
    "source: {dsn: host=x, heartbeat_interval: '${D}', max_slot_inactive: 1.5h, max_retained_wal: 1000}",
    HEAD + "store: {schema: mine, partitions: '${N}', retention: ' 7 d ', retention_bytes: 100GB, max_retention: 30d}",
    HEAD + "store: {partitions: '16', retention_bytes: null}\nhttp: null\nlog: {format: json, level: '${X:-debug}'}",
    HEAD + "store: {retention_bytes: 12345}\nhttp: {listen: '[::1]:9187'}",
    HEAD + "http: {listen: '${X:-127.0.0.1:1}'}",
    consumer("mode: '${MODE}', start: '${X:-earliest}', visibility_timeout: '${D}', max_message_bytes: '${S}'"),
    consumer("max_deliveries: '${N}', max_in_flight: '${N}', retry_delay: {initial: 500ms, factor: '${F}', max: 10m}"),
    consumer("retry_delay: {factor: 3}, operations: [insert, '${X:-delete}'], key: [a, b], role: '${X:-me}'"),
    consumer("columns: {exclude: [a]}, filter: 'true', topics: [t], compact: 'no'"),
    consumer("max_message_bytes: 1048576, max_deliveries: 5.0, compact: false, role: null, filter: null, key: null"),
    consumer("sink: {type: file, path: '${X:-out}'}"),
    consumer(
        "sink: {type: http, url: 'https://h/{topic}', batch: {max_messages: '${N}', linger: 5ms}, timeout: '${D}'}"
    ),
    consumer("sink: {type: kafka, bootstrap_servers: [a], topic: t, producer: {retries: 3, x: true}}, filter: 'true'"),
    HEAD + "consumers: [{name: '${X:-c}', mode: stream, topics: ['${X:-t}'], compact: '${B}'}]",
]
BAD = [
    "source: {dsn: host=x, slots: a}",
    "source: {dsn: host=x, slot: 'A b'}",
    "source: {dsn: 5}",
    "source: {dsn: host=x, plugin: decoderbufs}",
    "source: {dsn: host=x, heartbeat_interval: 10}",
    "source: {dsn: host=x, heartbeat_interval: 10 parsecs}",
    "source: {dsn: host=x, max_retained_wal: 10 gb}",
    "source: {dsn: host=x, max_retained_wal: -1}",
    "source: {dsn: host=x, event_trigger: perhaps}",
    "source: {dsn: host=x, failover: never}",
    "sources: {dsn: host=x}",
    HEAD + "store: {partitions: 0}",
    HEAD + "store: {partitions: many}",
    HEAD + "store: {partitions: 1.5}",
    HEAD + "http: {listen: nowhere}",
    HEAD + "log: {level: loud}",
    HEAD + "consumers: {name: c}",
    HEAD + "consumers: [{tables: [public.t]}]",
    consumer("mode: topic"),
    consumer("max_deliveries: 0"),
    consumer("operations: [upsert]"),
    consumer("retry_delay: {factor: 0}"),
    consumer("retry_delay: 5s"),
    consumer("tables: public.t"),
    consumer("key: id"),
    consumer("columns: {only: [a]}"),
    consumer("visibility_timeout: null"),
    consumer("filter: 5"),
    consumer("sink: {type: pigeon, path: out}"),
    consumer("sink: {path: out}"),
    consumer("sink: {type: file}"),
    consumer("sink: {type: file, path: out, topic: t}"),
    consumer("sink: {type: file, path: out, on_failure: shrug}"),
    consumer("sink: {type: redis, url: 'redis://r', stream: s, wait_replicas: -1}"),
]


@pytest.mark.parametrize("text", GOOD)
def test_what_the_program_accepts_the_schema_accepts(tmp_path: Path, text: str) -> None:
    assert both(tmp_path, text) == (True, True)


@pytest.mark.parametrize("text", BAD)
def test_what_the_schema_refuses_the_program_refuses(tmp_path: Path, text: str) -> None:
    assert both(tmp_path, text.replace("tables: [public.t], tables", "tables")) == (False, False)


def test_the_shipped_example_is_accepted_and_each_of_its_keys_is_known(tmp_path: Path) -> None:
    assert both(tmp_path, EXAMPLE.read_text()) == (True, True)


def inside(annotation: Any) -> list[type[BaseModel]]:
    """The models that a type contains."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for one in getattr(annotation, "__args__", ()) for model in inside(one)]


def test_the_schema_knows_every_key() -> None:
    schema = file_schema()
    models: list[type[BaseModel]] = [Config]
    for model in models:
        node: dict[str, Any] = schema if model is Config else schema["$defs"][model.__name__]
        assert set(node["properties"]) == {field.alias or name for name, field in model.model_fields.items()}
        for field in model.model_fields.values():
            models += [one for one in inside(field.annotation) if one not in models]
    assert {model.__name__ for model in models} == {"Config", *schema["$defs"]}


def test_a_file_without_what_the_environment_gives_is_accepted() -> None:
    VALIDATE({"consumers": []})
    VALIDATE({"source": {"slot": "mine"}})


def test_defaults_are_written_as_in_the_file() -> None:
    properties = file_schema()["$defs"]["Source"]["properties"]
    assert (properties["heartbeat_interval"]["default"], properties["max_retained_wal"]["default"]) == ("10s", "10GB")


def test_every_key_has_a_description_and_an_example() -> None:
    schema = file_schema()
    for name, node in [("", schema), *schema["$defs"].items()]:
        for key, one in node["properties"].items():
            said = one.get("description") or schema["$defs"][one["$ref"].rpartition("/")[2]]["description"]
            assert said.endswith("."), f"{name}.{key}"
            assert one.get("examples") or "$ref" in one, f"{name}.{key}"


SINKS: dict[str, dict[str, Any]] = {
    "NatsSink": {"type": "nats", "servers": ["nats://n"], "stream": "S", "subject": "s"},
    "KafkaSink": {"type": "kafka", "bootstrap_servers": ["k"], "topic": "t"},
    "RedisSink": {"type": "redis", "url": "redis://r", "stream": "s"},
    "RabbitmqSink": {"type": "rabbitmq", "url": "amqp://r", "exchange": "e"},
    "SqsSink": {"type": "sqs", "queue_url": "https://q"},
    "HttpSink": {"type": "http", "url": "https://h"},
    "FileSink": {"type": "file", "path": "p"},
    "CustomSink": {"type": "custom", "adapter": "a:B", "destination": "d"},
}


@pytest.mark.parametrize("model", SINKS)
def test_the_example_of_each_key_of_a_sink_is_accepted(tmp_path: Path, model: str) -> None:
    names = ("NATS_CREDENTIALS", "KAFKA_PASSWORD", "HOOK_TOKEN", "HOOK_SECRET", "PASSWORD")
    for key, one in file_schema()["$defs"][model]["properties"].items():
        sink = {**SINKS[model], key: yaml.safe_load(one["examples"][0])}
        if key == "stream" and model == "RabbitmqSink":
            del sink["exchange"]
        file = {"source": {"dsn": "host=x"}, "consumers": [{"name": "c", "tables": ["public.t"], "sink": sink}]}
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump(file))
        load(path, {**VALUES, **dict.fromkeys(names, "x")})
        VALIDATE(file)


def test_the_example_of_each_key_is_accepted(tmp_path: Path) -> None:
    """Each by itself, beside what it needs."""
    beside = {"on_leave": {"filter": "true"}, "compact": {"mode": "stream"}}
    definitions = file_schema()["$defs"]
    for section in ("Source", "Store", "Log", "Http", "RetryDelay", "Columns", "Consumer"):
        for key, one in definitions[section]["properties"].items():
            value = yaml.safe_load(one["examples"][0])
            file: dict[str, Any] = {"source": {"dsn": "host=x"}}
            if section in ("RetryDelay", "Columns", "Consumer"):
                inner = {"RetryDelay": "retry_delay", "Columns": "columns"}.get(section)
                given = {inner: {key: value}} if inner else {key: value}
                file["consumers"] = [{"name": "c", "tables": ["public.t"], **beside.get(key, {}), **given}]
            else:
                file[section.lower()] = {**file.get(section.lower(), {}), key: value}
            path = tmp_path / "c.yaml"
            path.write_text(yaml.safe_dump(file))
            load(path, {**VALUES, "STANDBY_URL": "host=y", "STORE_URL": "host=z"})
            VALIDATE(file)
