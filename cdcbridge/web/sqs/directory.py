"""Find the queue that a request names: a queue or fifo consumer, or the dead letters of one.

The queue NAME is the consumer NAME, and NAME-dead is its dead letters. A fifo consumer is also NAME.fifo, because some
clients look at the end of the name. Never creates a queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from time import monotonic
from typing import Any, Final

from cdcbridge.web.sqs.attributes import MOST_BYTES
from cdcbridge.web.sqs.errors import NO_SUCH_QUEUE, SqsError
from cdcbridge.web.store import WebStore

ACCOUNT: Final = "000000000000"
_DEAD: Final = "-dead"
_FIFO: Final = ".fifo"
_FRESH: Final = 1.0  # seconds for which the list of consumers is used
_CONSUMERS: Final = (
    "select c.id, c.name, c.mode, c.config, c.created_at, c.updated_at from consumers c"
    " where may_read(c.config ->> 'role') order by c.name"
)


@dataclass(slots=True, frozen=True)
class NamedQueue:
    """A queue of the endpoint.

    Attributes:
        consumer: The name of the consumer.
        name: The name of the queue, as the request wrote it.
        letters: Whether the queue is the dead letters of the consumer.
    """

    consumer: str
    name: str
    id: int
    fifo: bool
    config: Mapping[str, Any]
    created_at: datetime
    updated_at: datetime
    letters: bool = False

    @property
    def dead(self) -> str:
        """The name of the queue of dead letters."""
        ends = self._ends
        return self.name.removesuffix(ends) + _DEAD + ends

    @property
    def source(self) -> str:
        """The name of the queue whose dead letters these are."""
        ends = self._ends
        return self.name.removesuffix(ends).removesuffix(_DEAD) + ends

    @property
    def _ends(self) -> str:
        return _FIFO if self.name.endswith(_FIFO) and self.name != self.consumer else ""

    @property
    def most_bytes(self) -> int:
        """The size of the largest message that can be sent."""
        return min(MOST_BYTES, int(self.config["max_message_bytes"]))


class Directory:
    """The queues of the store. The list is read again after a second, and for an unknown name.

    Args:
        store: The sessions on the store.
    """

    def __init__(self, store: WebStore) -> None:
        self._store = store
        self._queues: dict[str, NamedQueue] = {}
        self._streams: frozenset[str] = frozenset()
        self._read_at = -_FRESH

    async def queues(self) -> list[NamedQueue]:
        """Return all queues, those of dead letters included, in the order of their names."""
        await self._read()
        found = list(self._queues.values())
        letters = [replace(one, name=one.dead, letters=True) for one in found]
        return sorted((*found, *(one for one in letters if one.name not in self._queues)), key=lambda one: one.name)

    async def find(self, name: str) -> NamedQueue:
        """Return the queue of this name.

        Raises:
            SqsError: There is none.
        """
        if monotonic() - self._read_at < _FRESH and (found := self._named(name)) is not None:
            return found
        await self._read()
        if (found := self._named(name)) is not None:
            return found
        if name in self._streams:
            raise SqsError(NO_SUCH_QUEUE, f"The consumer {name!r} is a stream, which is not a queue."
                           f" Read it with POST /api/streams/{name}/read, or through SQL.")  # fmt: skip
        raise SqsError(NO_SUCH_QUEUE, f"The specified queue does not exist: no queue or fifo consumer is named"
                       f" {name!r}. A queue is declared in the configuration file.")  # fmt: skip

    def forget(self) -> None:
        """Read the list again at the next look."""
        self._read_at = -_FRESH

    def _named(self, name: str) -> NamedQueue | None:
        if (found := self._living(name)) is not None:
            return found
        plain = name.removesuffix(_FIFO)
        ends = name[len(plain) :]
        if plain.endswith(_DEAD) and (found := self._living(plain.removesuffix(_DEAD) + ends)) is not None:
            return replace(found, name=name, letters=True)
        return None

    def _living(self, name: str) -> NamedQueue | None:
        if (found := self._queues.get(name)) is not None:
            return found
        found = self._queues.get(name.removesuffix(_FIFO))
        return replace(found, name=name) if found is not None and found.fifo else None

    async def _read(self) -> None:
        rows = await self._store.rows(_CONSUMERS)
        self._queues = {
            name: NamedQueue(name, name, number, mode == "fifo", config, created_at, updated_at)
            for number, name, mode, config, created_at, updated_at in rows
            if mode != "stream"
        }
        self._streams = frozenset(row[1] for row in rows if row[2] == "stream")
        self._read_at = monotonic()


def consumers_of(name: str) -> set[str]:
    """Return the names of all consumers that a queue of this name can belong to, whether they exist or not.

    For example, billing-dead belongs to the consumer of this name, or to the consumer billing.
    """
    plain = name.removesuffix(_FIFO)
    source = plain.removesuffix(_DEAD)
    return {name, plain, source, source + name[len(plain) :]}


def name_in_url(url: str) -> str:
    """Return the name of the queue in a queue's URL, or in its path. A name alone is returned as it is."""
    return url.partition("?")[0].rstrip("/").rpartition("/")[2]


def name_in_arn(arn: str) -> str | None:
    """Return the name of the queue in an ARN such as arn:aws:sqs:eu-central-1:000000000000:billing-dead, or None."""
    parts = arn.split(":")
    return parts[5] if len(parts) == 6 and parts[0] == "arn" and parts[2] == "sqs" else None
