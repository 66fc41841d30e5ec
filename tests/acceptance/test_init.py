"""`cdcbridge init`: a file that `run` takes, made from the tables that are there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from cdcbridge.config import load
from tests.harness import forked
from tests.harness.world import PATIENCE, World, clean_environment, eventually, fresh_database

TABLES = (
    "create table orders (id int primary key, total numeric)",
    "create table lines (order_id int, line int, primary key (order_id, line))",
    "create table log (at timestamptz, text text)",
    "create table emails (email text not null unique, name text)",
    "create table whole (a int); alter table whole replica identity full",
    "create table deferred (id int primary key deferrable)",
    "create table nothing (id int primary key); alter table nothing replica identity nothing",
    "create unlogged table scratch (id int primary key)",
    "create table parts (id int primary key) partition by range (id)",
    "create table parts_1 partition of parts for values from (0) to (10)",
    "create table bare (id int) partition by range (id)",
    "create table bare_1 partition of bare for values from (0) to (10)",
    'create table "odd: # name" (id int primary key)',
    'create table "two\nlines" ("a\nb" int primary key)',
    'create table "two\nloose" (a int)',
    "create view seen as select 1 as one",
    "create schema sales",
    "create table sales.offers (id int primary key)",
    'create schema "a.b"',
    'create table "a.b".hidden (id int primary key)',
)


@pytest.fixture(params=["pg15", "pg18"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    server = request.getfixturevalue(request.param)
    with fresh_database(server) as database:
        made = World(server, database, "auto", tmp_path)
        yield made
        made.close()


def program(
    world: World, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return forked.program(world.folder, *arguments, environment=environment)


def test_two_commands_and_the_changes_arrive(shop: World) -> None:
    shop.execute(*TABLES)
    url = {"DATABASE_URL": shop.dsn, "CDCBRIDGE_SOURCE__SLOT": shop.slot, "CDCBRIDGE_HTTP__LISTEN": "127.0.0.1:0"}
    made = program(shop, "init", environment=url)
    assert made.returncode == 0, made.stderr
    assert made.stdout == "cdcbridge.yaml: 7 tables\n"
    assert made.stderr.endswith("next: cdcbridge run\n")
    text = (shop.folder / "cdcbridge.yaml").read_text()
    assert shop.dsn not in text and "dsn: ${DATABASE_URL}" in text
    (consumer,) = load(shop.folder / "cdcbridge.yaml", url).consumers
    assert (consumer.name, consumer.mode) == ("changes", "fifo")
    assert set(consumer.tables) == {
        "public.orders", "public.lines", "public.whole", "public.parts", "public.odd: # name", "public.two\nlines",
        "sales.offers",
    }  # fmt: skip
    assert "- public.lines          # key: order_id, line" in text
    for name, fix in (
        ("log", 'alter table "public"."log" replica identity full;'),
        ("emails", 'alter table "public"."emails" replica identity using index "emails_email_key";'),
        ("nothing", 'alter table "public"."nothing" replica identity default;'),
        ("scratch", "it is unlogged"),
        ("bare", "no primary key"),
    ):  # fmt: skip
        assert f"# - public.{name}  #" in text and fix in text, (name, text)
        assert f"left out: public.{name}: " in made.stderr
    assert "parts_1" not in text and "seen" not in text
    checked = program(shop, "check", environment=url)
    assert checked.returncode == 0, (checked.stdout, text)
    bridge = subprocess.Popen(
        [sys.executable, "-m", "cdcbridge", "run"], cwd=shop.folder, stderr=subprocess.DEVNULL,
        env={**clean_environment(), "PYTHONPATH": str(Path.cwd()), **url},
    )  # fmt: skip
    try:
        eventually(lambda: bridge.poll() is not None or shop.active(), "the bridge streams")
        shop.execute("insert into orders values (1, 2)", "insert into log values (now(), 'x')", "delete from orders")
        got = program(shop, "receive", "changes", "--wait", "20", "--ack", environment=url)
        assert json.loads(got.stdout.splitlines()[0])["data"]["record"] == {"id": 1, "total": 2}, got
    finally:
        bridge.send_signal(signal.SIGTERM)
        assert bridge.wait(PATIENCE) == 0


def test_a_fix_from_the_file_lets_the_table_in(shop: World) -> None:
    shop.execute(*TABLES)
    text = program(shop, "init", "-", "--dsn", shop.dsn).stdout
    fixes = [line.strip(" #") for line in text.splitlines() if line.strip(" #").startswith("alter table")]
    fixes = [fix for fix in fixes if fix.count('"') % 2 == 0]  # a name with a line's end stands in two comments
    assert len(fixes) >= 5, text
    for fix in fixes:
        shop.execute(fix)
    again = program(shop, "init", "-", "--dsn", shop.dsn).stdout
    for name in ("log", "emails", "nothing", "deferred"):
        assert f"  - public.{name} " in again and f"# - public.{name} " not in again, again


def test_a_file_that_is_there_stays(shop: World) -> None:
    shop.execute("create table t (id int primary key)")
    path = shop.folder / "cdcbridge.yaml"
    path.write_text("mine\n")
    refused = program(shop, "init", "--dsn", shop.dsn)
    assert refused.returncode == 2 and "cdcbridge.yaml already exists" in refused.stderr
    assert "--force" in refused.stderr and path.read_text() == "mine\n"
    elsewhere = program(shop, "init", "other.yaml", "--dsn", shop.dsn)
    assert elsewhere.returncode == 0 and "next: cdcbridge -c other.yaml run" in elsewhere.stderr, elsewhere
    assert (shop.folder / "other.yaml").stat().st_mode & 0o077 == 0, "it may have a password"
    assert program(shop, "init", "--dsn", shop.dsn, "--force").returncode == 0
    assert load(path).source_dsn == shop.dsn
    assert sorted(p.name for p in shop.folder.iterdir()) == ["cdcbridge.yaml", "other.yaml"]


def test_an_empty_database_and_a_table_without_a_key(shop: World) -> None:
    empty = program(shop, "init", "--dsn", shop.dsn)
    assert empty.returncode == 0 and "0 tables" in empty.stdout, empty
    assert load(shop.folder / "cdcbridge.yaml").consumers == ()
    shop.execute("create table log (a int)")
    only = program(shop, "init", "-", "--dsn", shop.dsn)
    assert (
        "consumers: []" in only.stdout and "# - public.log  # no replica identity: it has no primary key" in only.stdout
    )
    assert not any(line.startswith("consumers:") and line != "consumers: []" for line in only.stdout.splitlines())


@pytest.mark.settings(wal_level="replica")
def test_what_check_finds_is_in_the_comments(own15: object, tmp_path: Path) -> None:
    world = World(own15, "postgres", "auto", tmp_path)  # type: ignore[arg-type]
    world.execute("create table t (id int primary key)")
    made = program(world, "init", "--dsn", world.dsn)
    text = (tmp_path / "cdcbridge.yaml").read_text()
    assert made.returncode == 0 and "next: cdcbridge check, after the fixes above" in made.stderr
    assert "#   error: source: wal_level is replica" in text
    assert "#     fix: alter system set wal_level = 'logical'" in text
    assert [c.tables for c in load(tmp_path / "cdcbridge.yaml").consumers] == [("public.t",)]
    world.close()


def test_a_role_that_may_not_replicate_reads_the_grant(shop: World) -> None:
    shop.execute("create table t (id int primary key)")
    role = f"plain_{shop.database}"
    shop.execute(f"create role {role} login")
    try:
        text = program(shop, "init", "-", "--dsn", shop.server.dsn(shop.database, role)).stdout
        assert f"fix: alter role {role} replication;" in text
    finally:
        shop.execute(f"drop role {role}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "neither --dsn nor the environment variable DATABASE_URL"),
        (("--dsn", "nonsense"), "the DSN cannot be parsed"),
        (("absent/cdcbridge.yaml", "--dsn", "{dsn}"), "absent"),
    ],
)
def test_what_goes_wrong_is_said(world18: World, arguments: tuple[str, ...], message: str) -> None:
    result = program(world18, "init", *(argument.format(dsn=world18.dsn) for argument in arguments))
    assert result.returncode in (1, 2) and message in result.stderr and "Traceback" not in result.stderr


def test_a_slot_of_another_database_keeps_its_name(shop: World) -> None:
    shop.execute("create table t (id int primary key)")
    with psycopg.connect(shop.server.dsn("postgres"), autocommit=True) as admin:
        admin.execute("select pg_create_logical_replication_slot('cdcbridge', 'pgoutput')")
        try:
            text = program(shop, "init", "-", "--dsn", shop.dsn).stdout
        finally:
            admin.execute("select pg_drop_replication_slot('cdcbridge')")
    assert f"  slot: cdcbridge_{shop.database} " in text
