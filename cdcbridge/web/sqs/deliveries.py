"""The statements with which messages are delivered, deleted and kept for longer: those of a queue, and of its letters.

Both have the same values and columns, so that one function serves both. Never runs a statement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cdcbridge.web.queues import DUE, GIVE_BACK


@dataclass(slots=True, frozen=True)
class DeliveryStatements:
    """The statements of one kind of queue.

    Attributes:
        kind: A letter that is part of a receipt handle.
        receive: Takes the most bytes of data, the consumer, the number of messages, and the seconds that they are
            invisible. The data of rows beyond the limit is null. The first row is always whole.
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
    "receipt, seq, topic, key, case when n = 1 or size <= %s then document end, deliver_count, commit_lsn::text,"
    " floor(extract(epoch from inserted_at) * 1000)::bigint"
)


def _receive(call: str) -> str:
    return (  # no part of it comes from a caller
        f"select {_COLUMNS} from (select *, row_number() over so_far as n,"  # noqa: S608
        " sum(octet_length(document)) over so_far as size"
        f" from (select r.*, r.data::text as document from {call} r) r window so_far as (rows unbounded preceding)) r"
    )


_EXTEND: Final = (
    "select e.done = 1 from unnest(%s::text[], %s::float8[]) with ordinality g (receipt, seconds, n)"
    " cross join lateral {}(%s, array[g.receipt], make_interval(secs => g.seconds)) e (done) order by g.n"
)
IN_ORDER: Final = DeliveryStatements(
    kind="f",
    receive=_receive("receive(%s, %s::int, make_interval(secs => %s), durable => false)"),
    due=DUE,
    give_back=GIVE_BACK,
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
    receive=_receive("read_letters(%s, %s::int, make_interval(secs => %s))"),
    due="select q.id, 1.0::float8 from queue_settings(%s) q where %s::text is not null",
    give_back="select give_back_letters(%s, %s)",
    delete="select purge_letters(%s, %s)",
    extend=_EXTEND.format("extend_letters"),
)
