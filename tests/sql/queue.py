"""The SQL surface, called as any language would."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.rows import dict_row

from cdcbridge.changes.keys import partition_of
from cdcbridge.changes.position import Position
from cdcbridge.config import Consumer
from cdcbridge.routing.batch import AppendBatch
from cdcbridge.routing.copy_format import encode_data, message_row, shared_part, with_old_key
from cdcbridge.store.consumers import apply
from cdcbridge.store.log import BridgeStore

Row = dict[str, Any]


class StoreQueue:
    """A store with one consumer `c`, and a session for each of those who ask for one."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._store = BridgeStore(dsn, "cdcbridge")
        self._store.migrate()
        self._store.begin_epoch()
        self._lsn = 100
        self.session = self.open()
        self.sessions = [self.session]

    def close(self) -> None:
        for session in self.sessions:
            session.close()
        self._store.close()

    def open(self, *, autocommit: bool = True) -> psycopg.Connection[Row]:
        session: psycopg.Connection[Row] = psycopg.connect(self.dsn, autocommit=autocommit, row_factory=dict_row)
        session.execute("set search_path = public")
        if not autocommit:
            session.commit()
        if hasattr(self, "sessions"):
            self.sessions.append(session)
        return session

    def declare(self, name: str = "c", **settings: Any) -> int:
        apply(self._store.connection, [Consumer(name=name, **{"tables": ("public.t",), **settings})])
        return int(self.value("select id from cdcbridge.consumers where name = %s", name))

    def append(self, count: int, *consumers: int) -> list[int]:
        """`count` messages in one append, to these consumers (default: the first); their seqs."""
        return self._append([str(n) for n in range(count)], consumers or (1,), keyed=False)

    def append_keys(self, *keys: str | None, consumers: tuple[int, ...] = (1,)) -> list[int]:
        """A message for each key, in one append, as fan-out gives them to fifo consumers; "!" is a truncate."""
        return self._append(list(keys), consumers, keyed=True)

    def next_segment(self) -> None:
        """The log goes on in the next segment."""
        query = (
            "select setval('cdcbridge.messages_seq', (last_value / 1000000 + 1) * 1000000) from cdcbridge.messages_seq"
        )
        self.session.execute(query)
        self.session.execute("select cdcbridge_internal.create_segments()")

    def append_changes(self, *changes: tuple[str, str | None, str | None]) -> list[int]:
        """(op, key, the key before) of changes of public.t that groups read; their seqs."""
        self._lsn += 10
        rows, partitions = [], []
        for n, (op, key, old_key) in enumerate(changes):
            shared = shared_part("public.t", self._lsn, 7, 0)
            data = encode_data(op, {"id": key} if key else None, {"id": old_key} if old_key else None, ())
            text = None if key is None else key.encode()
            partitions.append(partition_of(text, self._store.partitions()))
            rows.append(
                message_row(n, text, partitions[-1], data, with_old_key(shared, old_key) if old_key else shared)
            )
        position = Position(self._lsn, len(rows))
        return self._store_batch(AppendBatch(rows, partitions=partitions, position=position, end_lsn=self._lsn + 1))

    def _append(self, keys: list[str | None], consumers: tuple[int, ...], *, keyed: bool) -> list[int]:
        self._lsn += 10
        rows = []
        own = [None if key == "!" else key for key in keys]
        for n, key in enumerate(keys):
            truncate = encode_data("truncate", None, None, ())
            data = truncate if key == "!" else encode_data("insert", {"id": n, "secret": "s"}, None, ())
            text = None if (key_ := own[n]) is None else key_.encode()
            rows.append(message_row(n, text, 0, data, shared_part("public.t", self._lsn, 7, 0)))
        everything = list(range(len(keys)))
        batch = AppendBatch(
            rows, groups={consumers: everything}, position=Position(self._lsn, len(keys)), end_lsn=self._lsn + 1
        )
        if keyed:
            batch.in_order = frozenset(consumers)
            batch.keys = own
            batch.barriers = [n for n, key in enumerate(keys) if key == "!"]
        return self._store_batch(batch)

    def _store_batch(self, batch: AppendBatch) -> list[int]:
        before = self.value("select coalesce(max(seq), 0) from cdcbridge.messages")
        self._store.append(batch, None)
        return [r["seq"] for r in self.all("select seq from cdcbridge.messages where seq > %s order by seq", before)]

    def all(self, query: str, *args: Any, session: psycopg.Connection[Row] | None = None) -> list[Row]:
        return (session or self.session).execute(query.encode(), args or None).fetchall()

    def value(self, query: str, *args: Any, session: psycopg.Connection[Row] | None = None) -> Any:
        return next(iter(self.all(query, *args, session=session)[0].values()))

    def receive(self, count: int = 10, timeout: str | None = None, *, name: str = "c",
                session: psycopg.Connection[Row] | None = None) -> list[Row]:  # fmt: skip
        return self.all("select * from cdcbridge.receive(%s, %s, %s::interval)", name, count, timeout, session=session)

    def ack(self, *receipts: str, strict: bool = False, session: psycopg.Connection[Row] | None = None) -> int:
        return int(self.value("select cdcbridge.ack('c', %s, %s)", list(receipts), strict, session=session))

    def nack(self, *receipts: str, delay: str | None = None, reason: str | None = None, dead: bool = False) -> int:
        query = "select cdcbridge.nack('c', %s, %s::interval, %s, %s)"
        return int(self.value(query, list(receipts), delay, reason, dead))

    def extend(self, timeout: str, *receipts: str) -> int:
        return int(self.value("select cdcbridge.extend('c', %s, %s::interval)", list(receipts), timeout))

    def states(self) -> Row:
        """How many messages are where."""
        return self.all("select pending, in_flight, dead from cdcbridge.consumer_lag() where name = 'c'")[0]

    def expire(self) -> None:
        """Time passes: every delivery's visibility timeout is over."""
        self.session.execute("update cdcbridge_internal.leases set not_visible_until = now() - interval '1 s'")

    def due(self) -> None:
        """Time passes: every delay is over."""
        self.session.execute("update cdcbridge_internal.delayed set visible_at = now() - interval '1 s'")
