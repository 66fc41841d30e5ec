"""Define a subscription: the part of a consumer's settings that routing needs.

It is built from stored settings, dumped as JSON and loaded again, all of that only here. The module is pure and must
never read a store: `cdcbridge.store.consumers` reads the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cdcbridge.routing.filters import Filter


@dataclass(slots=True, frozen=True)
class Subscription:
    """The part of a consumer's settings that routing needs.

    Attributes:
        consumer_id: The consumer's id in the store.
        name: The consumer's name.
        tables: The patterns of tables.
        operations: The operations that it takes, for example insert.
        filter: The compiled filter, or None.
        key: The columns of its own key. None: it uses the log's key.
        max_bytes: The most bytes of `data` that it takes.
        in_order: Whether the mode is fifo.
        topics: The topics of published messages that it takes.
        reads_log: Whether the mode is stream, which gets no fan-out rows.
        columns: All columns that its `key` and `columns` settings name.
        on_leave: Whether a row that leaves the filter is delivered as a delete.
        two_way: Whether it is a mirror with a second direction, which decides conflicts by commit times.
    """

    consumer_id: int
    name: str
    tables: tuple[str, ...]
    operations: frozenset[str]
    filter: Filter | None = None
    key: tuple[str, ...] | None = None
    max_bytes: int = 1024 * 1024
    in_order: bool = False
    topics: tuple[str, ...] = ()
    reads_log: bool = False
    columns: frozenset[str] = frozenset()
    on_leave: bool = False
    two_way: bool = False

    @property
    def plain(self) -> bool:
        """True if the consumer takes every message of its tables and operations as it is."""
        return self.filter is None and self.key is None

    @property
    def own_keys(self) -> bool:
        """True if its messages have keys of their own.

        A row that left the filter has the key that it had before.
        """
        return self.key is not None or self.on_leave

    @classmethod
    def from_config(cls, consumer_id: int, name: str, mode: str, config: dict[str, Any]) -> Subscription:
        """Build it from a row of the store's table `consumers`."""
        source, chosen = config.get("filter"), config.get("columns") or {}
        return cls(
            consumer_id,
            name,
            tuple(config["tables"]),
            frozenset(config["operations"]),
            Filter(source) if source is not None else None,
            tuple(config["key"]) if config.get("key") else None,
            config["max_message_bytes"],
            mode == "fifo",
            tuple(config.get("topics", ())),
            mode == "stream",
            frozenset([*(config.get("key") or ()), *(name for names in chosen.values() for name in names or ())]),
            config.get("on_leave") == "delete",
            "two_way" in config.get("mirror", ()),
        )

    def dump(self) -> dict[str, Any]:
        """Return the subscription as JSON. A transaction that is appended in part must be finished with it."""
        return {
            "consumer_id": self.consumer_id,
            "name": self.name,
            "tables": list(self.tables),
            "operations": sorted(self.operations),
            "filter": self.filter.source if self.filter else None,
            "key": list(self.key) if self.key else None,
            "max_bytes": self.max_bytes,
            "in_order": self.in_order,
            "reads_log": self.reads_log,
            "topics": list(self.topics),
            "columns": sorted(self.columns),
            "on_leave": self.on_leave,
            "two_way": self.two_way,
        }

    @classmethod
    def load(cls, entry: dict[str, Any]) -> Subscription:
        """Return the subscription that `dump()` wrote."""
        return cls(
            entry["consumer_id"],
            entry["name"],
            tuple(entry["tables"]),
            frozenset(entry["operations"]),
            Filter(entry["filter"]) if entry["filter"] else None,
            tuple(entry["key"]) if entry["key"] else None,
            entry["max_bytes"],
            entry.get("in_order", False),
            tuple(entry.get("topics", ())),
            entry.get("reads_log", False),
            frozenset(entry.get("columns", ())),
            entry.get("on_leave", False),
            entry.get("two_way", False),
        )
