"""Decide on a message for one consumer: take it, pass it over, or bury it.

This is the one place that decides it. It decides on changes and published messages as they arrive, on rows of
backfills, and on messages of the log. Therefore a message gets the same verdict in each of these cases. The first of
these rules that applies gives the verdict:

1. A published message that cannot be read is a dead letter.
2. A message that the filter refuses is passed over, however large it is.
3. A message that is too large is a dead letter, also if the filter failed on it.
4. A message that the filter failed on is a dead letter.
5. All others are taken.

`on_leave: delete` asks whether the row matched the filter before this update. If the WAL does not have the answer, the
answer counts as yes. For example, an order changes from paid to cancelled, and the consumer's filter is
`record.status == 'paid'`. The module is pure and never stores a verdict.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple, TypeAlias

from cdcbridge.changes.events import Row
from cdcbridge.changes.keys import key_text
from cdcbridge.routing.dead_reasons import filter_error, not_loaded, oversized, undecodable
from cdcbridge.routing.filters import Filter, FilterError
from cdcbridge.routing.judged import Changed, Logged, known_before
from cdcbridge.routing.logical_messages import Published
from cdcbridge.routing.subscription import Subscription


class Take(NamedTuple):
    """The verdict that the consumer gets the message.

    Attributes:
        key: The message's key for this consumer.
        data: The data that replaces the log's `data`, if a row left the filter: a delete of it. None: the log's.
    """

    key: str | None
    data: bytes | None = None


class Pass(NamedTuple):
    """The verdict that the consumer's filter refuses the message."""


class Bury(NamedTuple):
    """The verdict that the message becomes a dead letter of the consumer at once.

    Attributes:
        reason: The reason in words, from `dead_reasons`.
        key: As for Take.
        data: As for Take.
    """

    reason: str
    key: str | None
    data: bytes | None = None


Verdict: TypeAlias = Take | Pass | Bury
PASS: Final = Pass()


def verdict(wanted: Subscription, message: Changed | Logged | Published) -> Verdict:
    """Decide on a message that the consumer's tables and operations, or its topics, match."""
    key = message.key if wanted.key is None else message.own_key(wanted.key)
    if wanted.filter is None and isinstance(message, Changed) and len(message.data) <= wanted.max_bytes:
        return Take(key)  # the most frequent case, without the questions below
    data: bytes | None = None
    failed: FilterError | None = None
    if isinstance(message, Published):
        if message.malformed is not None:
            return Bury(undecodable(message.malformed), key)
    elif wanted.filter is not None and message.of_table:
        try:
            said = _filtered(wanted.filter, message, on_leave=wanted.on_leave)
        except FilterError as error:
            failed = error
        else:
            if said == "passed":
                return PASS
            if said == "left":
                row = message.row_that_left()
                # This message reports that the row left the filter.
                data, key = message.encode("delete", row, None, ()), _key_before(wanted, message, row)
    reason = _too_large(message, data, wanted.max_bytes) or (None if failed is None else filter_error(failed))
    return Take(key, data) if reason is None else Bury(reason, key, data)


def verdicts(special: Iterable[Subscription], message: Changed) -> list[tuple[Subscription, Take | Bury]]:
    """Return the verdicts of those consumers that take or bury the message."""
    found = []
    for subscription in special:
        said = verdict(subscription, message)
        if not isinstance(said, Pass):
            found.append((subscription, said))
    return found


def _too_large(message: Changed | Logged | Published, data: bytes | None, limit: int) -> str | None:
    """Return the reason of a message with more bytes than the limit, or None.

    If `data` is given, its size counts.
    """
    if isinstance(message, Logged) and message.least is not None:
        return not_loaded(message.least, limit)
    size = message.size if data is None else len(data)
    return oversized(size, limit) if size > limit else None


def _filtered(wanted: Filter, message: Changed | Logged, *, on_leave: bool) -> Literal["taken", "passed", "left"]:
    """Ask the filter whether it takes the message, passes it over, or the row left it.

    Raise FilterError if the filter fails. If a filter fails on the row before the update, the row counts as one that
    left.
    """
    environment, unchanged = message.environment()
    if wanted.wants(environment, unchanged):
        return "taken"
    if not on_leave or environment["op"] != "update":
        return "passed"
    record, old = environment["record"] or {}, environment["old"]
    before = known_before(record, old, message.identity)
    unknown = [name for name in (*record, *unchanged) if name not in before]
    key = message.key if message.old_key is None else message.old_key
    # The consumer may have received the row by one of these operations.
    for op in ("insert", "update", "read") if wanted.reads_op else ("update",):
        try:
            if wanted.wants({**environment, "op": op, "record": before, "old": None, "key": key}, unknown):
                return "left"
        except FilterError:
            return "left"  # it cannot be told
    return "passed"


def _key_before(wanted: Subscription, message: Changed | Logged, row: Row) -> str | None:
    """Return the consumer's key of a row that left the filter: the key by which the consumer knows the row."""
    if wanted.key is not None:
        return key_text(row, wanted.key)
    return message.key if message.old_key is None else message.old_key
