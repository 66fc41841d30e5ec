"""Try a consumer's filter on the latest messages of the log, and give the reason for each result.

Reads the store. Never changes anything.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Any, Final, NamedTuple

import orjson

from cdcbridge.config import Config
from cdcbridge.database import Connection, store_errors
from cdcbridge.errors import UsageError
from cdcbridge.routing.dead_reasons import FILTER_ERROR
from cdcbridge.routing.filters import Filter
from cdcbridge.routing.logical_messages import members
from cdcbridge.routing.subscription import Subscription
from cdcbridge.routing.verdict import Bury, Pass, verdict
from cdcbridge.store.consumers import stored_config
from cdcbridge.store.replay import identities_of, latest, logged

DELIVERED: Final = "delivered"
LEFT: Final = "delivered as a delete"
LEFT_OUT: Final = "left out"
UNDECIDABLE: Final = "delivered, undecidable"
DEAD: Final = "dead letter"


class Trial(NamedTuple):
    """The result of the filter for one message.

    Attributes:
        values: The values that the filter reads from the message, as JSON. For example {"record.status": '"paid"'}.
    """

    seq: int
    topic: str
    key: str | None
    op: str
    result: str
    why: str
    values: dict[str, str]


def wanted(config: Config, store: Connection, name: str) -> Subscription:
    """Return the consumer as the file declares it, whether it has been applied or not. Else return it from the store.

    Raises:
        UsageError: Neither the file nor the store has the consumer, or it is a stream.
    """
    with store_errors():
        rows = store.execute("select id, name, mode, config from consumers").fetchall()
    known = {row[1]: row for row in rows}
    for consumer in config.consumers:
        if consumer.name == name:
            applied = known[name][0] if name in known else 0  # the id finds rows that its own backfills have read
            found = Subscription.from_config(applied, name, consumer.mode, stored_config(consumer))
            break
    else:
        if name not in known:
            raise _unknown(name, {*known, *(consumer.name for consumer in config.consumers)})
        found = Subscription.from_config(*known[name])
    if found.reads_log:
        raise UsageError(f"consumer {name!r} is a stream: it reads the log as it is, and has no filter")
    return found


def _unknown(name: str, names: Collection[str]) -> UsageError:
    near = difflib.get_close_matches(name, sorted(names), n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(sorted(names)) or 'none'}."
    return UsageError(f"no consumer named {name!r}, neither in the file nor in the store", hint=hint)


def trials(store: Connection, subscription: Subscription, last: int, low: int = 0) -> list[Trial]:
    """Try the filter on the latest messages that match the consumer's tables, topics and operations.

    At most `last` messages are tried, all with a seq above `low`. The result for the oldest message is the first.
    """
    with store_errors():
        identities = identities_of(store)
        rows = latest(store, subscription, last, low)
    return [_trial(subscription, row, identities) for row in rows]


def _trial(subscription: Subscription, row: Sequence[Any], identities: dict[str, frozenset[str]]) -> Trial:
    message = logged(row, identities)
    parts = dict(members(row[3]))
    op = str(orjson.loads(parts["op"]))
    said = verdict(subscription, message)
    values: dict[str, str] = {}
    if (
        subscription.filter is not None
        and message.of_table
        and (not isinstance(said, Bury) or said.reason.startswith(FILTER_ERROR))
    ):
        values = _values(subscription.filter, parts, message.key)
    if isinstance(said, Bury):
        result, why = DEAD, said.reason
    elif isinstance(said, Pass):
        result, why = LEFT_OUT, "the filter gives false"
    elif not message.of_table:
        result, why = DELIVERED, f"a {'published' if op == 'message' else 'gap'} message is always delivered"
    elif subscription.filter is None:
        result, why = DELIVERED, "the consumer has no filter"
    elif said.data is not None:
        result, why = LEFT, "the filter gives false, and the row may have matched before"
    elif missing := subscription.filter.missing(*message.environment()):
        result, why = UNDECIDABLE, f"the WAL did not carry {', '.join(sorted(missing))}"
    else:
        result, why = DELIVERED, "the filter gives true"
    return Trial(row[0], message.topic, message.key, op, result, why, values)


def _values(condition: Filter, parts: dict[str, str], key: str | None) -> dict[str, str]:
    """Return the values that the filter reads, as far as the message contains them."""
    found = {"op": parts["op"]} if "op" in condition.variables else {}
    if "key" in condition.variables:
        found["key"] = orjson.dumps(key).decode()
    for name in ("record", "old"):
        row = dict(members(parts[name])) if parts[name] != "null" else {}
        found |= {f"{name}.{column}": row[column] for column in sorted(condition.reads(name)) if column in row}
    return found
