"""Divide changes into segments whose rows can be applied together, one statement for each table and operation.

Within a segment only the last change of each key counts. For example, an insert and two updates of one row become one
insert. The order between keys does not matter there, because the transaction commits all of them or none. The module
is pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cdcbridge.mirrors.changes import MirroredChange

_FRESH = ("insert", "read")


@dataclass(slots=True)
class Segment:
    """Changes that are applied together.

    Attributes:
        changes: All changes, in their order.
        net: The last change of each key, by table and key.
        fresh: The keys whose first change is an insert, or a row that a backfill read, by table. Their rows did not
            exist before the segment.
        keyless: Changes of tables without a key, by table.
        alone: A change that has to be applied by itself: a truncate, or an update that changed a key. None: there is
            none, and the other attributes count.
    """

    changes: list[MirroredChange] = field(default_factory=list)
    net: dict[str, dict[str, MirroredChange]] = field(default_factory=dict)
    fresh: dict[str, set[str]] = field(default_factory=dict)
    keyless: dict[str, list[MirroredChange]] = field(default_factory=dict)
    alone: MirroredChange | None = None


def segments(changes: Iterable[MirroredChange], *, in_order: bool = False) -> Iterator[Segment]:
    """Divide the changes of one target transaction into segments.

    Args:
        changes: The changes, in the order of the log.
        in_order: Whether the operations of different tables must not change places, because triggers and foreign keys
            look at them. Then a segment has one operation of one table.
    """
    segment = Segment()
    kind = ("", "")
    for change in changes:
        row = change.row
        topic, key = row.topic, row.key
        if change.op == "truncate" or (row.old_key is not None and row.old_key != key):
            if segment.changes:
                yield segment
            yield Segment([change], alone=change)
            segment = Segment()
            continue
        if in_order and segment.changes and kind != (topic, change.op):
            yield segment
            segment = Segment()
        kind = (topic, change.op)
        if key is None:
            segment.keyless.setdefault(topic, []).append(change)
            segment.changes.append(change)
            continue
        net = segment.net.get(topic)
        if net is not None and key in net and (change.unchanged or in_order):
            # The columns that this change lacks are in the one before, so that one has to be applied first.
            yield segment
            segment = Segment()
            net = None
        if net is None:
            net = segment.net[topic] = {}
            segment.fresh[topic] = set()
        if key not in net and change.op in _FRESH:
            segment.fresh[topic].add(key)
        net[key] = change
        segment.changes.append(change)
    if segment.changes:
        yield segment
