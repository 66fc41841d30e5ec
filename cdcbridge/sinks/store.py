"""The sessions of a sinks' process on the store: lanes and their leases, outcomes, counters.

Never contacts a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import orjson

from cdcbridge.client._session_async import AsyncSession, open_session
from cdcbridge.database import behind_pooler, search_path, store_errors
from cdcbridge.errors import StoreUnavailable
from cdcbridge.sinks.log_session import PATIENCE
from cdcbridge.sinks.message import Origin

_MEMBERS: Final = (
    "select count(*) from sink_members where consumer_id = %s and seen_at >= moment() - make_interval(secs => %s)"
)
_LEASE: Final = "select lane, seq, first_seq, surplus from lease_lanes(%s, %s, %s, make_interval(secs => %s))"


class Held(NamedTuple):
    """A lane that this process may deliver.

    Attributes:
        lane: The number of the lane.
        seq: Everything up to this seq is done.
        first_seq: Where the lane began.
        surplus: Whether another process should have the lane.
    """

    lane: int
    seq: int
    first_seq: int
    surplus: bool


class SinkStore:
    """One session on the store, which is opened when it is first needed and after it was lost.

    Commits are asynchronous. If the store crashes, an offset or an ack of the last moment is lost, and the message is
    delivered again, or found in the target.

    Args:
        dsn: The DSN of the store.
        schema: The schema of the store.
        member: The name of this process among those that share the lanes.
    """

    def __init__(self, dsn: str, schema: str, member: str) -> None:
        self._dsn = dsn
        self._schema = schema
        self.member = member
        self._session: AsyncSession | None = None

    async def rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return the rows of a statement.

        Raises:
            StoreUnavailable: The store cannot be reached.
        """
        session = await self._open()
        with store_errors():
            cursor = await session.execute(query.encode(), values)
            return await cursor.fetchall() if cursor.description else []

    async def value(self, query: str, values: Sequence[Any] = ()) -> Any:
        """Return the first value of the first row, or None."""
        rows = await self.rows(query, values)
        return rows[0][0] if rows else None

    async def listen(self) -> AsyncSession:
        """Return the session, which listens to the notifications of new messages."""
        session = await self._open()
        with store_errors():
            await session.execute(b'listen "' + self._schema.encode() + b'"')
        return session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _open(self) -> AsyncSession:
        if self._session is None or self._session.gone:
            session = await open_session(self._dsn, "cdcbridge sinks", patient=True)
            if session.pooled:
                await session.close()
                raise behind_pooler("store", "its sessions have other server processes")
            session.limit = PATIENCE
            with store_errors():
                await session.execute(
                    b"select set_config('search_path', %s, false), set_config('synchronous_commit', 'off', false)",
                    (search_path(self._schema),),
                )
            self._session = session
        return self._session

    # consumers

    async def consumer(self, name: str) -> tuple[int, bool] | None:
        """Return the id of a consumer, and whether it is paused. None: the store does not know it yet."""
        rows = await self.rows("select id, paused from consumers where name = %s", (name,))
        return (rows[0][0], rows[0][1]) if rows else None

    async def origin(self) -> Origin:
        """Return the identity of the source.

        Raises:
            StoreUnavailable: No bridge has recorded a source yet.
        """
        rows = await self.rows("select * from sink_source()")
        if not rows:
            raise StoreUnavailable("store: no bridge has read the source yet", hint="Start it: cdcbridge run")
        return Origin(*rows[0])

    async def partitions(self) -> int:
        """Return the number of the log's partitions, including those that it had before."""
        return int(await self.value("select max(partitions) from partitionings") or 1)

    # lanes

    async def lease(self, consumer: int, lanes: int, seconds: float) -> list[Held]:
        """Renew the leases of this process, and take free lanes up to its share. Return the lanes that it holds."""
        rows = await self.rows(_LEASE, (consumer, self.member, lanes, seconds))
        return [Held(*row) for row in rows]

    async def members(self, consumer: int, seconds: float) -> int:
        """Return the number of processes that deliver for a consumer, at least 1."""
        return max(1, int(await self.value(_MEMBERS, (consumer, seconds))))

    async def leave(self, consumer: int, lane: int | None) -> None:
        """Give a lane back, or all lanes of the consumer for None."""
        await self.rows("select leave_lane(%s, %s, %s)", (consumer, self.member, lane))

    async def end(self, consumer: int, lane: int, lanes: int, after: int) -> int:
        """Return a seq up to which the lane has no messages after `after`, now or later."""
        return int(await self.value("select end_of_lane(%s, %s, %s, %s)", (consumer, lane, lanes, after)))

    async def move(self, consumer: int, lane: int, lanes: int, seq: int) -> bool:
        """Move the lane's offset. Return False if the lane no longer belongs to this process."""
        return bool(await self.value("select move_lane(%s, %s, %s, %s, %s)", (consumer, self.member, lane, lanes, seq)))

    async def log_end(self) -> int:
        """Return the last seq that was drawn."""
        return int(await self.value("select coalesce(pg_sequence_last_value('messages_seq'), 0)"))

    # outcomes

    async def bury(self, consumer: int, refused: Sequence[tuple[int, str | None, str]]) -> int:
        """Make dead letters of messages, given as seq, key and reason. Return their number."""
        columns = [list(column) for column in zip(*refused, strict=True)]
        return int(await self.value("select bury_refused(%s, %s, %s, %s)", (consumer, *columns)))

    async def pause(self, consumer: int) -> None:
        """Pause the consumer, whose target wants no more messages."""
        await self.rows("update consumers set paused = true, updated_at = now() where id = %s", (consumer,))

    async def note(
        self, consumer: int, counts: Sequence[int], seconds: float, error: str | None, blocked: dict[str, Any] | None
    ) -> None:
        """Add to the counters of the sink, and record its present error."""
        told = None if blocked is None else orjson.dumps(blocked).decode()
        await self.rows(
            "select note_sink(%s, %s::bigint[], %s, %s, %s::jsonb)", (consumer, list(counts), seconds, error, told)
        )
