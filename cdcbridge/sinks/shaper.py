"""Turn a message of the log into the form in which it is delivered: filter, columns, mask, transform and format.

A message that cannot be shaped becomes a dead letter, with a reason. The module is pure and never contacts a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple

import orjson

from cdcbridge import __version__
from cdcbridge.config import Consumer
from cdcbridge.config.sink import destination_of, shown_destination
from cdcbridge.config.sink_base import SinkBase
from cdcbridge.routing.dead_reasons import undecodable
from cdcbridge.routing.destination import Destination, NoDestination
from cdcbridge.routing.filters import FilterError
from cdcbridge.routing.judged import Logged
from cdcbridge.routing.transform import Transform
from cdcbridge.sinks.debezium import NEW_KEY, OLD_KEY, Debezium, of_moved_row
from cdcbridge.sinks.formats import JSON, CloudEvents, Content, Format, cdcbridge, headers_of
from cdcbridge.sinks.mask import masked
from cdcbridge.sinks.message import SinkMessage
from cdcbridge.sinks.plain_form import Place
from cdcbridge.sinks.target import Outgoing

SINK: str = "sink: "  # the beginning of the reason of a message that a sink refused
_DESTINATIONS: Final = 4096  # names that are remembered: messages of a table often have the same one


class Unshaped(NamedTuple):
    """A message that cannot be delivered, and becomes a dead letter.

    Attributes:
        message: The message.
        reason: The reason in words.
    """

    message: SinkMessage
    reason: str


@dataclass(slots=True, frozen=True)
class Names:
    """The names that formats and destinations contain.

    Attributes:
        source: The name of the source, from `source.name` or its database.
        database: The source's database.
    """

    source: str
    database: str


class Shaper:
    """The settings of a sink that concern the form of its messages.

    Args:
        consumer: The consumer, which has a sink.
        names: The names that messages contain.
        attribute_prefix: The target's prefix of CloudEvents attributes among the headers.
    """

    def __init__(self, consumer: Consumer, names: Names, attribute_prefix: str | None) -> None:
        sink = consumer.needed_sink
        self._destination = Destination(destination_of(sink), shown_destination(sink))
        self._by_key = "key" in self._destination.placeholders
        self._fill = lru_cache(_DESTINATIONS)(self._filled)
        self._mask: Mapping[str, str] = sink.mask
        self._transform = Transform(sink.transform) if sink.transform is not None else None
        self._format = _format(sink, names, attribute_prefix)
        self._source = names.source
        self._plain = not self._mask and self._transform is None and self._format is cdcbridge
        # Debezium's tombstone, for topics that Kafka compacts.
        self._tombstones = sink.format == "debezium" and sink.type == "kafka"

    def shape(self, message: SinkMessage) -> Sequence[Outgoing] | Unshaped:
        """Return the message in the form in which it is delivered, or why it cannot be."""
        if self._tombstones and message.old_key is not None:
            return self._moved(message)
        try:
            if self._mask and "." in message.topic:
                message = message._replace(data=masked(message.data, self._mask))
            destination = self._place(message)
            body, headers = self._content(message)
        except NoDestination as error:
            return Unshaped(message, f"{SINK}{error}")
        except FilterError as error:
            return Unshaped(message, f"{SINK}the transform failed: {error}")
        except (ValueError, IndexError) as error:
            return Unshaped(message, undecodable(str(error)))
        one = Outgoing(
            message.seq, message.id, message.key, message.partition, destination, body, headers, message.deliver_count
        )
        if self._tombstones and message.op == "delete" and message.key is not None:
            return (one, one._replace(id=f"{one.id}/tombstone", body=None))
        return (one,)

    def _moved(self, message: SinkMessage) -> Sequence[Outgoing] | Unshaped:
        """Return Debezium's events of an update that changed the key: a delete, a tombstone and a create."""
        deleted, created = of_moved_row(message)
        ends, begins = self.shape(deleted), self.shape(created)
        if isinstance(ends, Unshaped):
            return ends
        if isinstance(begins, Unshaped):
            return begins
        new, old = {NEW_KEY: message.key or ""}, {OLD_KEY: message.old_key or ""}
        return [
            *(one._replace(headers={**one.headers, **new}) for one in ends),
            *(one._replace(headers={**one.headers, **old}) for one in begins),
        ]

    @property
    def plain_place(self) -> Place | None:
        """Where messages are delivered, if their content is that of the log. None: their content is another one."""
        if not self._plain:
            return None
        return self._at if self._destination.placeholders else self._destination.template

    def _place(self, message: SinkMessage) -> str:
        if not self._destination.placeholders:
            return self._destination.template
        return self._at(message.topic, message.op, message.key, message.partition)

    def _at(self, topic: str, op: str, key: str | None, partition: int) -> str:
        return self._fill(topic, op, key if self._by_key else None, partition)

    def _filled(self, topic: str, op: str, key: str | None, partition: int) -> str:
        schema, dot, table = topic.partition(".")
        values = {
            "source": self._source,
            "schema": schema if dot else None,
            "table": table if dot else None,
            "topic": topic,
            "op": op,
            "key": key,
            "partition": str(partition),
        }
        return self._destination.fill(values)

    def _content(self, message: SinkMessage) -> Content:
        if self._transform is None:
            return self._format(message)
        logged = Logged(message.data, message.topic, message.key, message.commit_lsn, message.ordinal, message.xid)
        environment, _unchanged = logged.environment()
        return self._transform.body(environment), headers_of(message) | {"content-type": JSON}


def _format(sink: SinkBase, names: Names, attribute_prefix: str | None) -> Format:
    if sink.format == "debezium":
        return Debezium(names.source, names.database, __version__)
    if sink.format == "cloudevents":
        return CloudEvents(names.source, attribute_prefix if sink.content_mode == "binary" else None)
    return cdcbridge


def as_json(outgoing: Outgoing) -> dict[str, Any]:
    """Return a message as `cdcbridge sinks test` prints it."""
    try:
        body: Any = None if outgoing.body is None else orjson.Fragment(outgoing.body)
        orjson.dumps(body)
    except orjson.JSONEncodeError:
        body = (outgoing.body or b"").decode(errors="replace")
    return {
        "seq": outgoing.seq,
        "id": outgoing.id,
        "key": outgoing.key,
        "destination": outgoing.destination,
        "headers": dict(outgoing.headers),
        "body": body,
    }
