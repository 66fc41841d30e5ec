"""A new store is made from schema.sql. A store of an earlier version is brought to the same tables, with all that it holds."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psycopg
import pytest

from cdcbridge import __version__
from cdcbridge.database import connect_store
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import OperatorNeeded
from cdcbridge.store import migrate, sql_files
from tests.conftest import DEBIAN_15
from tests.harness.world import fresh_database
from tests.sql.queue import StoreQueue
from tests.sql.test_queue import receipts, seqs

TABLES = Path(__file__).parents[2] / "sql" / "schema.sql"
# The tables of version 1, kept when it is released. See sql/migrations/README.md.
FIRST_RELEASE = Path(__file__).with_name("first_release.sql")
STEP = (2, "note", "alter table leases add note text default 'migrated'; create index on gaps (at)")


def definitions(server: EmbeddedServer, database: str) -> list[str]:
    """Every line of the database's definition; sorted, because a migration adds a column as the last one."""
    command = [str(DEBIAN_15 / "pg_dump"), "--schema-only", "--dbname", server.dsn(database)]
    dumped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted(line.rstrip(",") for line in dumped.splitlines() if not line.startswith(("--", "\\")))


def of_the_first_release(dsn: str) -> None:
    """A store of version 1, without functions, as its program left it."""
    with psycopg.connect(dsn, autocommit=True) as session:
        session.execute("create schema cdcbridge; create schema cdcbridge_internal")
        session.execute("set search_path = cdcbridge_internal, cdcbridge")
        session.execute((FIRST_RELEASE if FIRST_RELEASE.exists() else TABLES).read_bytes())
        for table in sql_files.PUBLIC_TABLES:
            session.execute(f"alter table {table} set schema cdcbridge".encode())
        session.execute("insert into schema_migrations (version, name) values (1, 'schema')")


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_new_store_has_the_tables_of_a_migrated_one(
    pg15: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, forgotten: bool
) -> None:
    assert FIRST_RELEASE.exists() or not sql_files.migrations(), "keep the tables of the first release"
    if forgotten:  # a migration whose change schema.sql lacks
        steps = [*sql_files.migrations(), STEP]
        monkeypatch.setattr(sql_files, "migrations", lambda: steps)
    with fresh_database(pg15) as new, fresh_database(pg15) as old:
        of_the_first_release(pg15.dsn(old))
        for database, version in (new, 0), (old, 1):
            with connect_store(pg15.dsn(database), "cdcbridge") as store:
                done = migrate.migrate(store, "cdcbridge")
                assert (done.before, done.after) == (version, migrate.newest_version())
        differ = set(definitions(pg15, new)) ^ set(definitions(pg15, old))
        assert bool(differ) is forgotten, differ


def test_a_bridge_keeps_the_functions_of_a_newer_program(queue: StoreQueue) -> None:
    """In a rolling restart the old bridge's session may begin anew after the new one has installed its functions."""
    queue.session.execute("update cdcbridge_internal.schema_code set program = '99.10.0', checksum = 'newer'")
    with connect_store(queue.dsn, "cdcbridge") as store:
        assert migrate.migrate(store, "cdcbridge") == migrate.Migrated(1, 1, code_replaced=False)
        assert queue.value("select program from cdcbridge_internal.schema_code") == "99.10.0"
        assert migrate.migrate(store, "cdcbridge", downgrade=True) == migrate.Migrated(1, 1, code_replaced=True)
        assert queue.value("select program from cdcbridge_internal.schema_code") == __version__


def test_a_migration_runs_once_and_keeps_what_the_store_holds(
    queue: StoreQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.declare()
    put = queue.append(6)
    first = receipts(queue.receive(1))
    queue.nack(*receipts(queue.receive(1)), delay="0")
    monkeypatch.setattr(sql_files, "migrations", lambda: [STEP])
    with connect_store(queue.dsn, "cdcbridge") as store:
        done = [migrate.migrate(store, "cdcbridge") for _ in range(2)]
    assert [(one.before, one.after) for one in done] == [(1, 2), (2, 2)]
    assert seqs(queue.all("select seq from cdcbridge.consumer_messages order by seq")) == put
    assert queue.ack(*first) == 1, "a receipt of before"
    assert sorted(seqs(queue.receive())) == put[1:]
    assert queue.value("select string_agg(distinct note, ',') from cdcbridge_internal.leases") == "migrated"


@pytest.mark.parametrize("dropped", [False, True])
def test_a_store_of_an_earlier_layout_is_refused_with_the_way_on(queue: StoreQueue, dropped: bool) -> None:
    if dropped:
        queue.session.execute("drop schema cdcbridge cascade")
    else:
        queue.session.execute("alter table cdcbridge_internal.schema_migrations set schema cdcbridge")
    with connect_store(queue.dsn, "cdcbridge") as store:
        for look in (migrate.schema_version, lambda session: migrate.migrate(session, "cdcbridge")):
            with pytest.raises(OperatorNeeded, match="an earlier development version") as raised:
                look(store)
            assert "cdcbridge uninstall" in str(raised.value.hint)
