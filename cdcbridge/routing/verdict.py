"""Decide what becomes of a message for one consumer: it takes it, it passes it over, or it buries it. Pure.

The one place that decides this, for changes and published messages as they arrive, for rows of backfills, and for what
the log holds already. So a message is the same whichever way it takes. The first of these that holds is the verdict:

1. A published message that cannot be read is a dead letter.
2. A message that the filter refuses is passed over, however large it is.
3. A message that is too large is a dead letter, also where the filter failed on it.
4. A message that the filter failed on is a dead letter.
5. All others are taken.

`on_leave: delete` answers the question "did the row match before this update?". Where the WAL does not tell, the answer
is yes. For example, an order goes from paid to cancelled, and the consumer's filter is `record.status == 'paid'`.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, TypeAlias

from cdcbridge.changes.events import Row
from cdcbridge.changes.keys import key_text
from cdcbridge.routing.copy_format import encode_data
from cdcbridge.routing.dead_reasons import filter_error, not_loaded, oversized, undecodable
from cdcbridge.routing.filters import Filter, FilterError
from cdcbridge.routing.judged import Changed, Logged, known_before
from cdcbridge.routing.logical_messages import Published
from cdcbridge.routing.subscription import Subscription


class Take(NamedTuple):
    """The consumer gets the message, with its own key of it.

    data: what replaces the log's `data`, where a row left the filter: a delete of it.
    """

    key: str | None
    data: bytes | None = None


class Pass(NamedTuple):
    """The consumer's filter refuses the message."""


class Bury(NamedTuple):
    """The message is a dead letter of the consumer at once. key, data: as of Take."""

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
                data, key = deletion(row), _key_before(wanted, message, row)
    reason = _too_large(message, data, wanted.max_bytes) or (None if failed is None else filter_error(failed))
    return Take(key, data) if reason is None else Bury(reason, key, data)


def _too_large(message: Changed | Logged | Published, data: bytes | None, limit: int) -> str | None:
    """The reason of a message with more bytes than the limit, or None. `data` counts in its place, if it is given."""
    if isinstance(message, Logged) and message.least is not None:
        return not_loaded(message.least, limit)
    size = message.size if data is None else len(data)
    return oversized(size, limit) if size > limit else None


def deletion(row: Row) -> bytes:
    """The `data` of the message that says that the row left."""
    return encode_data("delete", row, None, ())


def _filtered(wanted: Filter, message: Changed | Logged, *, on_leave: bool) -> Literal["taken", "passed", "left"]:
    """Ask the filter. Raises FilterError."""
    environment, unchanged = message.environment()
    if wanted.wants(environment, unchanged):
        return "taken"
    if not on_leave or environment["op"] != "update":
        return "passed"
    record, old = environment["record"] or {}, environment["old"]
    before = known_before(record, old, message.identity)
    unknown = [name for name in (*record, *unchanged) if name not in before]
    key = message.key if message.old_key is None else message.old_key
    # The row became known to the consumer by one of these.
    for op in ("insert", "update", "read") if wanted.reads_op else ("update",):
        try:
            if wanted.wants({**environment, "op": op, "record": before, "old": None, "key": key}, unknown):
                return "left"
        except FilterError:
            return "left"  # it cannot be told
    return "passed"


def _key_before(wanted: Subscription, message: Changed | Logged, row: Row) -> str | None:
    """The consumer's key of a row that left: the one by which it knows the row."""
    if wanted.key is not None:
        return key_text(row, wanted.key)
    return message.key if message.old_key is None else message.old_key
