"""The statements with which messages are delivered, deleted and kept for longer: those of a queue, and of its letters.

Both have the same values and columns, so that one function serves both. Never runs a statement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(slots=True, frozen=True)
class DeliveryStatements:
    """The statements of one kind of queue.

    Attributes:
        kind: A letter that is part of a receipt handle.
        receive: Takes the consumer, the number of messages, and the seconds that they are invisible.
        due: Takes the consumer twice. Returns its id, and the seconds until the next look.
        give_back: Takes the consumer and receipts.
        delete: Takes the consumer and receipts. Returns how many were deleted.
        extend: Takes receipts, seconds, and the consumer. Returns for each receipt whether it was in flight, in order.
    """

    kind: str
    receive: str
    due: str
    give_back: str
    delete: str
    extend: str


_COLUMNS: Final = (
    "r.receipt, r.seq, r.topic, r.key, r.data::text, r.deliver_count, r.commit_lsn::text,"
    " floor(extract(epoch from r.inserted_at) * 1000)::bigint"
)
_EXTEND: Final = (
    "select e.done = 1 from unnest(%s::text[], %s::float8[]) with ordinality g (receipt, seconds, n)"
    " cross join lateral {}(%s, array[g.receipt], make_interval(secs => g.seconds)) e (done) order by g.n"
)
IN_ORDER: Final = DeliveryStatements(
    kind="f",
    receive=f"select {_COLUMNS} from receive(%s, %s::int, make_interval(secs => %s), durable => false) r",  # noqa: S608
    due="select q.id, next_visible(%s) from queue_settings(%s) q",
    give_back="select give_back(%s, %s)",
    delete="select ack(%s, %s)",
    extend=_EXTEND.format("extend"),
)
ANY_ORDER: Final = DeliveryStatements(
    kind="q",
    receive=IN_ORDER.receive,
    due=IN_ORDER.due,
    give_back=IN_ORDER.give_back,
    delete="select ack_late(%s, %s)",
    extend=_EXTEND.format("extend_late"),
)
LETTERS: Final = DeliveryStatements(
    kind="d",
    receive=f"select {_COLUMNS} from read_letters(%s, %s::int, make_interval(secs => %s)) r",  # noqa: S608
    due="select q.id, 1.0::float8 from queue_settings(%s) q where %s::text is not null",
    give_back="select give_back_letters(%s, %s)",
    delete="select purge_letters(%s, %s)",
    extend=_EXTEND.format("extend_letters"),
)
