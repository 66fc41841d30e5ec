"""Two databases, each with a bridge's store in it, and a mirror between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.world import World, eventually, store_database


class Pair:
    """Side `a` and side `b`. A mirror `to_b` leads from a to b; with two_way, `to_a` leads back."""

    def __init__(self, a: World, b: World) -> None:
        self.a = a
        self.b = b

    @property
    def sides(self) -> tuple[World, World]:
        return self.a, self.b

    def both(self, *statements: str) -> None:
        """Run statements on both sides."""
        for side in self.sides:
            side.execute(*statements)

    def mirror(self, **settings: Any) -> None:
        """Declare the mirror from a to b."""
        self.a.mirrors = [{"name": "to_b", "target": {"dsn": self.b.dsn}, "tables": ["public.*"], **settings}]

    def two_way(self, back: dict[str, Any] | None = None, **settings: Any) -> None:
        """Declare the mirrors of both directions. `back` has settings of the one that leads back."""
        given = {"tables": ["public.*"], "start": "now", **settings}
        self.a.mirrors = [{"name": "to_b", "target": {"dsn": self.b.dsn}, "two_way": {"peer": "to_a"}, **given}]
        self.b.mirrors = [
            {"name": "to_a", "target": {"dsn": self.a.dsn}, "two_way": {"peer": "to_b"}, **given, **(back or {})}
        ]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The bridges and the mirrors of all sides that have mirrors."""
        with contextlib.ExitStack() as stack:
            for side in self.sides:
                if side.mirrors:
                    stack.enter_context(side.bridge())
            for side in self.sides:
                if side.mirrors:
                    stack.callback(_end, side.start_mirrors())
            yield

    def table(self, side: World, table: str) -> list[tuple[Any, ...]]:
        """The rows of a table, in an order that depends on them alone."""
        return sorted(side.sql.execute(f"select * from {table}".encode()).fetchall(), key=repr)

    def settle(self, *tables: str) -> None:
        """Wait until the mirrors have nothing left to apply, and check that the tables are equal on both sides."""
        for side in self.sides:
            if side.mirrors:
                self._drain(side)
        for table in tables:
            first, second = self.table(self.a, table), self.table(self.b, table)
            assert first == second, (sorted(set(first) - set(second)), sorted(set(second) - set(first)))

    @staticmethod
    def _drain(side: World) -> None:
        """Wait until the mirror of this side has applied everything that the side has committed."""
        lsn = side.value("select pg_current_wal_insert_lsn()")
        side.execute("select pg_logical_emit_message(true, 'cdcbridge.heartbeat', '')")
        eventually(partial(side.value, "select end_lsn >= %s from positions", lsn), "the log")
        seq = side.value("select coalesce(max(seq), 0) from messages")
        query = "select coalesce((select min(o.seq) >= %s from consumers c, newest_offsets(c.id) o where c.name = %s), false)"
        name = side.mirrors[0]["name"]
        eventually(partial(side.value, query, seq, name), f"{name} has applied seq {seq}")

    def pause(self) -> None:
        """Pause the mirrors of both sides, and wait until none applies."""
        for side in self.sides:
            side.json("mirror", "pause", side.mirrors[0]["name"])
        for side in self.sides:
            eventually(partial(side.value, "select not mirror_runs(id) from consumers"), "paused")

    def resume(self) -> None:
        for side in self.sides:
            side.json("mirror", "resume", side.mirrors[0]["name"])

    def conflicts(self, side: World) -> list[tuple[Any, ...]]:
        """The conflicts that the mirror to this side has decided."""
        return side.rows("select kind, key, winner, state from cdcbridge.conflicts order by id")

    def close(self) -> None:
        for side in self.sides:
            side.close()


def _end(process: Any) -> None:
    process.terminate()
    process.wait(timeout=30)


@contextlib.contextmanager
def pair(a: EmbeddedServer, b: EmbeddedServer, folder: Path, plugins: tuple[str, str]) -> Iterator[Pair]:
    """Two databases on two servers, or on the same one."""
    with store_database(a) as first, store_database(b) as second:
        worlds = []
        for number, (server, database, plugin) in enumerate(((a, first, plugins[0]), (b, second, plugins[1]))):
            home = folder / "ab"[number]
            home.mkdir()
            worlds.append(World(server, database, plugin, home))
        made = Pair(*worlds)
        try:
            yield made
        finally:
            made.close()
            for server in {a, b}:
                with psycopg.connect(server.dsn(), autocommit=True) as session:
                    for (name,) in session.execute("select roname from pg_replication_origin").fetchall():
                        with contextlib.suppress(psycopg.Error):
                            session.execute("select pg_replication_origin_drop(%s)", (name,))
