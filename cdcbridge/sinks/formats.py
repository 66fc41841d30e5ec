"""Make the content and the headers of a message in the format of a sink.

Values of rows are copied as the JSON texts that they are in the log, so that no number loses a digit. The module is
pure. `debezium` has a module of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final, TypeAlias

import orjson

from cdcbridge.sinks.message import SinkMessage

Headers: TypeAlias = Mapping[str, str]
Content: TypeAlias = tuple[bytes, Headers]
Format: TypeAlias = Callable[[SinkMessage], Content]
JSON: Final = "application/json"
CLOUDEVENTS: Final = "application/cloudevents+json"


def headers_of(message: SinkMessage) -> dict[str, str]:
    """Return the headers that a message has in every format."""
    return {
        "cdcbridge-id": message.id,
        "cdcbridge-seq": str(message.seq),
        "cdcbridge-topic": message.topic,
        "cdcbridge-op": message.op,
        "content-type": JSON,
    }


def cdcbridge(message: SinkMessage) -> Content:
    """Return the message as the log has it, with its identity."""
    seq, identity, topic, key, _, _, data, commit_lsn, at, _, commit_time, inserted_at, _, _ = message
    lsn = "null" if commit_lsn is None else f'"{commit_lsn}"'
    ordinal = "null" if at is None else at
    body = (
        f'{{"id":"{identity}","seq":{seq},"topic":{quoted(topic)},"key":{_json(key)},"data":{data},'
        f'"commit_lsn":{lsn},"ordinal":{ordinal},"commit_time":{commit_time},"inserted_at":{inserted_at}}}'
    )
    return body.encode(), headers_of(message)


class CloudEvents:
    """CloudEvents 1.0, with the attributes in the document (structured) or in the headers (binary).

    Source: CloudEvents 1.0.2, and its bindings for HTTP, Kafka, NATS and AMQP.

    Args:
        source: The name of the source, which becomes the attribute `source`.
        prefix: The prefix of attributes among the headers. None: structured.
    """

    def __init__(self, source: str, prefix: str | None) -> None:
        self._source = f"/cdcbridge/{source}"
        self._prefix = prefix

    def __call__(self, message: SinkMessage) -> Content:
        """Return a message as an event."""
        attributes = self._attributes(message)
        headers = headers_of(message)
        if self._prefix is None:
            known = orjson.dumps(attributes).decode()
            headers["content-type"] = CLOUDEVENTS
            return f'{known[:-1]},"datacontenttype":"{JSON}","data":{message.data}}}'.encode(), headers
        headers |= {self._prefix + name: value for name, value in attributes.items()}
        return message.data.encode(), headers

    def _attributes(self, message: SinkMessage) -> dict[str, str]:
        found = {
            "specversion": "1.0",
            "id": message.id,
            "source": self._source,
            "type": f"{message.topic}.{message.op}",
            "time": (message.inserted_at if message.commit_time == "null" else message.commit_time).strip('"'),
            "sequence": str(message.seq),
        }
        if message.key:  # an attribute must not be empty
            found |= {"subject": message.key, "partitionkey": message.key}
        return found


@lru_cache(4096)
def quoted(text: str) -> str:
    """Return a text that occurs often, for example a topic, as JSON."""
    return orjson.dumps(text).decode()


def _json(text: str | None) -> str:
    return "null" if text is None else orjson.dumps(text).decode()
