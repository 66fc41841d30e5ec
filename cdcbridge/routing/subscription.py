"""What routing needs of a consumer: built from its stored settings, dumped as JSON and loaded again. Pure.

The one place that does so. It must never read a store: `cdcbridge.store.consumers` reads the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cdcbridge.routing.filters import Filter


@dataclass(slots=True, frozen=True)
class Subscription:
    """What a consumer declared, as much as routing needs. `key` None: the log's key. `max_bytes` is of `data`.
    `in_order`: mode fifo. `reads_log`: mode stream, which gets no rows of its own. `topics`: of published messages.
    `columns`: all that its key and its columns name. `on_leave`: a row that leaves the filter is delivered as a delete.
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

    @property
    def plain(self) -> bool:
        """Takes every message of its tables and operations as it is."""
        return self.filter is None and self.key is None

    @property
    def own_keys(self) -> bool:
        """Its messages have keys of their own. A row that left the filter has the key it had before."""
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
        )

    def dump(self) -> dict[str, Any]:
        """The subscription as JSON, for a transaction that has to be finished with it."""
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
        }

    @classmethod
    def load(cls, entry: dict[str, Any]) -> Subscription:
        """The subscription that dump() wrote."""
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
        )
